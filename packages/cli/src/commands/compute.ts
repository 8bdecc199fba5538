/** `millrace compute`: build, push, run and inspect content-addressed computes. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import type { FunctionType, Limits, Metrics, Resolver } from '@millrace/compute';
import { action, examples, repeatable, type Session } from '../command.ts';
import type { FoundCompute } from '../compute-store.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine, table } from '../text-width.ts';
import { formatBytes, parseDuration, parseInteger } from '../units.ts';

interface RunOptions {
  readonly input?: string;
  readonly now?: string;
  readonly seed?: string;
  readonly fuel?: string;
  readonly maxWall?: string;
  readonly maxMemory?: string;
  readonly maxInput?: string;
  readonly maxOutput?: string;
  readonly maxPrepare?: string;
  readonly plugin?: readonly string[];
}

/** What a node grants a task unless it is told otherwise. */
const WALL_MS = 60_000;

export function registerCompute(program: Command, session: Session): void {
  const compute = program
    .command('compute')
    .description('functions from JSON to JSON, named by the hash of their code, run in a sandbox');
  compute
    .command('build')
    .description('build a compute and print its ref; it is kept in the data folder, with its sources')
    .argument('<file>', '.ts, .mts, .js or .mjs with a function as default export, or a WASI command .wasm')
    .addHelpText(
      'after',
      examples([
        ['millrace compute build ./summary.ts', 'prints compute://sha256/…, the same on every machine'],
        ['millrace compute build ./double.wasm --json', 'with size and engine'],
      ]) +
        '\nThe artifact is in computes/sha256/<digest> of the data folder, its sources in <digest>.source.json.\n',
    )
    .action(action(session, build));
  compute
    .command('push')
    .description('store a compute at the dispatcher, for tasks that name it')
    .argument('<ref|file>', 'compute://sha256/… that was built here, or a file to build')
    .addHelpText(
      'after',
      examples([
        ['millrace compute push ./summary.ts', 'builds and stores it; prints its ref'],
        ['millrace compute push compute://sha256/9f86… --url http://10.0.0.5:7070', 'what was built before'],
      ]) +
        '\n"millrace submit" and "millrace run" do this themselves for op://name and for what was built here.\n',
    )
    .action(action(session, push));
  compute
    .command('run')
    .description('run a compute here, in its sandbox; prints its output, measurements on stderr')
    .argument('<ref|file>', 'compute://sha256/… of the data folder or the dispatcher, or a file to build')
    .option('--input <json>', 'JSON, a file (@file when its name is JSON too), or - for stdin (default: {})')
    .option('--now <time>', 'the time it sees: RFC 3339 or milliseconds since 1970 (default: now)')
    .option('--seed <n>', 'start of its random numbers (default: always the same)')
    .option('--fuel <n>', 'count what it does and stop it past this many units (default: not counted)')
    .option('--max-wall <duration>', 'stop it after this long: 250ms, 5s (default: 60s)')
    .option(
      '--max-prepare <duration>',
      'stop it when compiling it and running its top level takes longer (default: 5s)',
    )
    .option('--max-memory <MiB>', 'memory it may use (default: 32)')
    .option('--max-input <bytes>', 'input it may be given (default: 4194304)')
    .option('--max-output <bytes>', 'output it may write (default: 4194304)')
    .option('--plugin <file>', "a module it is linked to, such as Javy's plugin; repeatable", repeatable)
    .addHelpText(
      'after',
      examples([
        [`millrace compute run ./summary.ts --input '{"samples":[1,2,3]}'`, 'one call'],
        [
          'cat big.json | millrace compute run compute://sha256/9f86… --input - --fuel 100000000',
          'from a pipe, metered',
        ],
        [
          'millrace compute run ./clock.js --now 2026-01-01T00:00:00Z --json',
          'repeatable; output and measurements as JSON',
        ],
      ]) + '\nExit codes: 0 done, 1 the compute failed, 2 it cannot be run as asked.\n',
    )
    .action(action(session, run));
  compute
    .command('inspect')
    .description('look into a compute without running it: imports, exports, memory, size, engine')
    .argument('<ref|file>', 'compute://sha256/… of the data folder or the dispatcher, or a file to build')
    .addHelpText(
      'after',
      examples([['millrace compute inspect ./double.wasm', 'what it asks for, and whether it would be run']]),
    )
    .action(action(session, inspect));
}

async function build(context: CommandContext, _options: object, file: string): Promise<ExitCode> {
  const { io, out } = context;
  const dataDir = resolveDataDir(context);
  const { findCompute } = await import('../compute-store.ts');
  if (file.includes('://')) {
    throw new MillraceError('invalid_argument', `build takes a file, got ${JSON.stringify(file)}`);
  }
  const { ref, engine, bytes } = await findCompute(file, { cwd: io.cwd, dataDir });
  out.result({ ref, engine, bytes: bytes.byteLength, data: dataDir }, () => [ref]);
  if (engine === 'wasm') {
    const { inspectCompute } = await import('@millrace/compute');
    const { refusal } = await inspectCompute(bytes);
    if (refusal !== null)
      out.note(`only nodes that grant it more than the default limits will run it: ${refusal}`);
  }
  return EXIT.done;
}

async function push(context: CommandContext, _options: object, target: string): Promise<ExitCode> {
  const { io, out } = context;
  const [{ findCompute, pushCompute }, { resolveAddress, withRequestor }] = await Promise.all([
    import('../compute-store.ts'),
    import('../connection.ts'),
  ]);
  const found = await findCompute(target, { cwd: io.cwd, dataDir: resolveDataDir(context) });
  const address = await resolveAddress(context);
  return await withRequestor(address, async (requestor) => {
    const stop = new AbortController();
    using _ = io.onStop(() => stop.abort(new MillraceError('canceled', 'interrupted')));
    const sent = await pushCompute(requestor.computes, found, stop.signal);
    const { ref, engine, bytes } = found;
    out.result({ ref, engine, bytes: bytes.byteLength, sent }, () => [ref]);
    out.note(
      sent ? `${formatBytes(bytes.byteLength)} sent to ${address.url}` : `${address.url} has it already`,
    );
    return EXIT.done;
  });
}

async function run(context: CommandContext, options: RunOptions, target: string): Promise<ExitCode> {
  const { io, out } = context;
  const limits = limitsOf(options, io.now());
  const [{ readComputeInput }, { ComputeManager, DEFAULT_LIMITS, computeReason, refOf }] = await Promise.all([
    import('../compute-store.ts'),
    import('@millrace/compute'),
  ]);
  const input = await readComputeInput(
    options.input ?? '{}',
    io,
    limits.maxInputBytes ?? DEFAULT_LIMITS.maxInputBytes,
  );
  const plugins = await Promise.all(
    (options.plugin ?? []).map((file) => readPlugin(path.resolve(io.cwd, file))),
  );
  const found = await findAnywhere(context, target);
  const stop = new AbortController();
  using _ = io.onStop(() => stop.abort(new MillraceError('canceled', 'interrupted')));
  let metrics: Metrics | null = null;
  const resolver = {
    resolve: () => Promise.resolve({ ...digestOf(found.ref), engine: found.engine, wasm: found.bytes }),
  };
  await using manager = new ComputeManager(resolver, limits, {
    workers: 1,
    engines: [],
    // Named by whoever runs it: what the file holds is what was meant.
    plugins: plugins.map((bytes) => ({ bytes, digest: refOf(bytes).digest })),
  });
  try {
    const output = await manager.run(found.ref, input, {
      signal: stop.signal,
      stderr: (bytes) => void io.stderr.write(found.explain(Buffer.from(bytes).toString('utf8'))),
      metricsSink: (measured) => (metrics = measured),
    });
    const text = Buffer.from(output).toString('utf8');
    out.result(
      {
        ref: found.ref,
        engine: found.engine,
        output: out.json ? (JSON.parse(text) as unknown) : null,
        metrics,
      },
      () => [text],
    );
    if (metrics !== null && !out.json) out.note(metricsLine(metrics));
    return EXIT.done;
  } catch (error) {
    // Before it ran the call was wrong; from then on the compute is what failed.
    if (stop.signal.aborted || !MillraceError.is(error)) throw error;
    if (metrics === null) throw computeReason(error) === 'module' ? refusedModule(error) : error;
    const message = found.explain(error.message);
    if (out.json) {
      out.document({
        ref: found.ref,
        engine: found.engine,
        error: { code: error.code, reason: computeReason(error), message },
        metrics,
      });
    } else {
      // What the guest said has been printed as it said it; left is how it ended.
      const { cause } = error.details;
      const ending = typeof cause === 'string' ? `the compute failed: ${found.explain(cause)}` : message;
      out.note(`millrace: ${ending.split('\n').map(oneLine).join('\n  ')}`);
      out.note(metricsLine(metrics));
    }
    return EXIT.failed;
  }
}

async function inspect(context: CommandContext, _options: object, target: string): Promise<ExitCode> {
  const { out } = context;
  const { inspectCompute } = await import('@millrace/compute');
  const { bytes, engine } = await readForInspection(context, target);
  const summary = await inspectCompute(bytes).catch((error: unknown) => {
    if (!MillraceError.is(error)) throw error;
    throw new MillraceError(error.code, `${target}: ${error.message}`, { details: error.details });
  });
  out.result({ ...summary, engine }, () => {
    const rows: [string, string][] = [
      ['ref', summary.ref],
      ['engine', engine],
      ['size', `${formatBytes(summary.bytes)} (${summary.bytes} bytes)`],
    ];
    if (summary.engine === 'quickjs') {
      rows.push(['imports', summary.imports.map(oneLine).join(', ') || 'none']);
      rows.push(['exports', summary.exports.map(oneLine).join(', ') || 'none']);
      rows.push(['memory', 'that of QuickJS, from 6 MiB on']);
    } else {
      if (summary.linkedTo !== null) rows.push(['linked to', oneLine(summary.linkedTo)]);
      rows.push(['functions', String(summary.functions)]);
      rows.push(['memory', summary.memory === null ? 'none of its own' : memoryText(summary.memory)]);
      for (const one of summary.imports) {
        const type = one.kind === 'function' ? ` ${signature(one.type)}` : '';
        rows.push(['import', oneLine(`${one.kind} ${one.module}.${one.name}${type}`)]);
      }
      for (const one of summary.exports) {
        const type = one.type === undefined ? '' : ` ${signature(one.type)}`;
        rows.push(['export', oneLine(`${one.kind} ${one.name}${type}`)]);
      }
    }
    rows.push(['runs', summary.refusal === null ? 'yes' : `no: ${oneLine(summary.refusal)}`]);
    return table([{ title: '' }, { title: '' }], rows, out.paint.dim).slice(1);
  });
  return EXIT.done;
}

/** A module that these limits, or any, keep from running: whoever calls can mend that. */
function refusedModule({ message, details }: MillraceError): MillraceError {
  const hint = details['limit'] === 'maxMemoryMb' ? '; --max-memory allows more' : '';
  return new MillraceError('invalid_argument', `${message}${hint}`, { details });
}

/** A module is looked at as it is: the ones that would be refused are those somebody wants to look into. */
async function readForInspection(
  context: CommandContext,
  target: string,
): Promise<Pick<FoundCompute, 'bytes' | 'engine'>> {
  if (target.includes('://') || path.extname(target) !== '.wasm') return await findAnywhere(context, target);
  const file = path.resolve(context.io.cwd, target);
  const bytes = await readFile(file).catch((error: unknown) => {
    throw new MillraceError('invalid_argument', `cannot read ${file}`, { cause: error });
  });
  return { bytes, engine: 'wasm' };
}

/** In the data folder, else at the dispatcher, if one is known: what is at hand should not need a network. */
async function findAnywhere(context: CommandContext, target: string): Promise<FoundCompute> {
  const { io } = context;
  const [{ dispatcherResolver, findCompute }, { findUrl, resolveAddress, withRequestor }] = await Promise.all(
    [import('../compute-store.ts'), import('../connection.ts')],
  );
  const place = { cwd: io.cwd, dataDir: resolveDataDir(context) };
  const url = target.startsWith('compute://') ? await findUrl(context) : null;
  if (url === null) return await findCompute(target, place);
  const resolver: Resolver = {
    async resolve(ref, options) {
      return await withRequestor(await resolveAddress(context), (requestor) =>
        dispatcherResolver(requestor.computes).resolve(ref, options),
      );
    },
  };
  return await findCompute(target, { ...place, elsewhere: { url, resolver } });
}

async function readPlugin(file: string): Promise<Uint8Array> {
  return await readFile(file).catch((error: unknown) => {
    throw new MillraceError('invalid_argument', `--plugin: cannot read ${file}`, { cause: error });
  });
}

function digestOf(ref: string): { readonly alg: string; readonly digest: string } {
  const [alg = '', digest = ''] = ref.slice('compute://'.length).split('/');
  return { alg, digest };
}

function limitsOf(options: RunOptions, nowMs: number): Partial<Limits> {
  const { now, seed, fuel, maxWall, maxPrepare, maxMemory, maxInput, maxOutput } = options;
  const most = Number.MAX_SAFE_INTEGER;
  return {
    now: now === undefined ? nowMs : parseMoment(now),
    maxWallMs: maxWall === undefined ? WALL_MS : Math.ceil(parseDuration(maxWall, '--max-wall')),
    ...(seed !== undefined && { seed: BigInt(parseInteger(seed, '--seed', 0, most)) }),
    ...(fuel !== undefined && { maxFuel: parseInteger(fuel, '--fuel', 0, most) }),
    ...(maxMemory !== undefined && { maxMemoryMb: parseInteger(maxMemory, '--max-memory', 1, 4096) }),
    ...(maxPrepare !== undefined && {
      maxPrepareMs: Math.ceil(parseDuration(maxPrepare, '--max-prepare')),
    }),
    ...(maxInput !== undefined && {
      maxInputBytes: parseInteger(maxInput, '--max-input', 0, 1024 ** 3),
    }),
    ...(maxOutput !== undefined && {
      maxOutputBytes: parseInteger(maxOutput, '--max-output', 0, 1024 ** 3),
    }),
  };
}

function parseMoment(text: string): number {
  const ms = /^\d+$/.test(text)
    ? Number(text)
    : /^\d{4}-\d\d-\d\dT/.test(text)
      ? Date.parse(text)
      : Number.NaN;
  if (Number.isFinite(ms)) return ms;
  throw new MillraceError(
    'invalid_argument',
    `--now must be RFC 3339, such as 2026-01-01T00:00:00Z, or milliseconds since 1970, got ${JSON.stringify(text)}`,
  );
}

function metricsLine(metrics: Metrics): string {
  const parts = [
    metrics.reason ?? metrics.status,
    `${metrics.wallMs.toFixed(2)} ms`,
    `prepared in ${metrics.prepareMs.toFixed(1)} ms`,
    `memory ${formatBytes(metrics.memoryBytes)}`,
    ...(metrics.fuelUsed === null ? [] : [`fuel ${metrics.fuelUsed}`]),
    `in ${formatBytes(metrics.inputBytes)}`,
    `out ${formatBytes(metrics.outputBytes)}`,
    ...(metrics.logDroppedBytes === 0
      ? []
      : [`${formatBytes(metrics.logDroppedBytes)} of diagnostics dropped`]),
  ];
  return parts.join(' · ');
}

function memoryText({ min, max }: { readonly min: number; readonly max: number | null }): string {
  const PAGE_BYTES = 65_536;
  return `from ${formatBytes(min * PAGE_BYTES)}${max === null ? '' : ` to ${formatBytes(max * PAGE_BYTES)}`}`;
}

function signature({ params, results }: FunctionType): string {
  return `(${params.join(', ')}) -> (${results.join(', ')})`;
}
