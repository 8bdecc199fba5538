/** `millrace runtime`: test, ask, deploy, debug, describe and find Golem runtimes. */
import path from 'node:path';
import { Writable } from 'node:stream';
import type { Command } from 'commander';
import { MillraceError, type JsonObject } from '@millrace/runner';
import type { InvocationResult } from '@millrace/runtime/supervisor';
import { action, examples, repeatable, type Session } from '../command.ts';
import { ensureDataDir, resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine, table } from '../text-width.ts';
import { formatDuration, parseDuration } from '../units.ts';

interface RuntimeOptions {
  readonly runtime: string;
  readonly env?: readonly string[];
}

interface TimedOptions extends RuntimeOptions {
  readonly timeout?: string;
}

interface DeployOptions extends TimedOptions {
  readonly workdir: string;
  readonly taskPackage?: string;
  readonly hostname?: string;
  readonly volume?: readonly string[];
}

interface DebugOptions extends RuntimeOptions {
  readonly workdir?: string;
  readonly taskPackage?: string;
  readonly protocol?: string;
  readonly script?: string;
  readonly trace?: boolean;
}

interface DescriptorOptions {
  readonly runtime: string;
  readonly dir?: string;
  readonly name?: string;
  readonly runtimeVersion?: string;
  readonly supervisor?: string;
  readonly description?: string;
  readonly extraArg?: readonly string[];
  readonly property?: readonly string[];
  readonly counter?: readonly string[];
}

const WHICH = `\n--runtime is a path, the name of an installed descriptor, or "wasi", the one that comes with this program.\n`;
const DESCRIPTION = 'a runtime: path, name of a descriptor, or wasi';
const WORDS = 'words put before the subcommand, behind --';

export function registerRuntime(program: Command, session: Session): void {
  const runtime = program
    .command('runtime')
    .description('Golem runtimes: try one out, and make it known to a provider');
  runtime
    .command('test')
    .description('run the self-test of a runtime, as a provider does when it starts')
    .requiredOption('-r, --runtime <path>', DESCRIPTION)
    .option('--env <name[=value]>', 'a variable granted to it; repeatable', repeatable)
    .option('--timeout <duration>', 'stop it after this long', '60s')
    .argument('[words...]', WORDS)
    .addHelpText(
      'after',
      examples([
        [
          'millrace runtime test --runtime ./echo.js',
          'its output as it is; exit code 0 when it passed, else 1',
        ],
        ['millrace runtime test --runtime wasi', 'whether programs can be run here'],
      ]) + WHICH,
    )
    .action(action(session, test));
  runtime
    .command('offer')
    .description('print what a runtime adds to the offer of a provider')
    .requiredOption('-r, --runtime <path>', DESCRIPTION)
    .option('--env <name[=value]>', 'a variable granted to it; repeatable', repeatable)
    .option('--timeout <duration>', 'stop it after this long', '60s')
    .argument('[words...]', WORDS)
    .addHelpText(
      'after',
      examples([['millrace runtime offer --runtime ./echo.js', 'constraints and properties, as JSON']]) +
        WHICH,
    )
    .action(action(session, offer));
  runtime
    .command('deploy')
    .description('deploy a runtime into a work directory and leave it at that')
    .requiredOption('-r, --runtime <path>', DESCRIPTION)
    .requiredOption('-w, --workdir <dir>', 'work directory; made if missing')
    .option('-t, --task-package <file>', 'an image')
    .option(
      '--volume <path>',
      'a volume the requestor asks for, as a path inside the runtime; repeatable',
      repeatable,
    )
    .option('--hostname <name>', 'host name the requestor asks for')
    .option('--env <name[=value]>', 'a variable granted to it; repeatable', repeatable)
    .option('--timeout <duration>', 'stop it after this long', '10m')
    .argument('[words...]', WORDS)
    .addHelpText(
      'after',
      examples([
        ['millrace runtime deploy --runtime ./echo.js --workdir /tmp/echo', 'its mode and volumes'],
        [
          'millrace runtime deploy --runtime wasi --workdir /tmp/w --task-package ./tools.zip',
          'checks and compiles the programs of an image',
        ],
      ]) + WHICH,
    )
    .action(action(session, deploy));
  runtime
    .command('dbg')
    .description(
      'a prompt over a runtime: deploy, start, run, kill, stop, with output and events as they come',
    )
    .requiredOption('-r, --runtime <path>', DESCRIPTION)
    .option('-w, --workdir <dir>', 'work directory; made if missing (default: a temporary one)')
    .option('-t, --task-package <file>', 'an image')
    .option('-p, --protocol <version>', 'the version told in hello', '0.1.0')
    .option('--script <file>', 'carry out the lines of a file; the first that fails ends it with exit code 1')
    .option('--trace', 'print each frame, decoded and in hex')
    .option('--env <name[=value]>', 'a variable granted to it; repeatable', repeatable)
    .argument('[words...]', WORDS)
    .addHelpText(
      'after',
      examples([
        [
          'millrace runtime dbg --runtime ./echo.js',
          'then: deploy, start, run say hello, stop; "help" lists the rest',
        ],
        [
          'millrace runtime dbg --runtime ./echo.js --script session.dbg --trace',
          'for tests, with every frame',
        ],
        ['millrace runtime dbg --runtime ./echo.js -- --greeting hi', 'with an option of its own'],
      ]) +
        WHICH +
        'Lines typed at a terminal are kept in runtime-dbg.history of the data folder; Tab completes.\nCtrl-C kills the command that is waited for, a second one harder; at the prompt it ends the session, as Ctrl-D.\n',
    )
    .action(action(session, debug));
  runtime
    .command('descriptor')
    .description('write the plugin descriptor by which a provider, or a node, finds a runtime')
    .requiredOption('-r, --runtime <path>', DESCRIPTION)
    .option('--dir <dir>', 'plugins folder (default: ~/.local/lib/yagna/plugins)')
    .option('--name <name>', 'default: as its --version says')
    .option('--runtime-version <version>', 'default: as its --version says')
    .option('--supervisor <path>', 'the supervisor, absolute or relative to the folder', 'exe-unit')
    .option('--description <text>', 'for people')
    .option(
      '--extra-arg <word>',
      'words for the supervisor, each by itself (default: --runtime-managed-image); repeatable',
      repeatable,
    )
    .option('--property <key=json>', 'put under golem.runtime in the offer; repeatable', repeatable)
    .option(
      '--counter <id=name:text>',
      'a usage counter with a price; they replace the usual ones; repeatable',
      repeatable,
    )
    .addHelpText(
      'after',
      examples([
        [
          'millrace runtime descriptor --runtime ./echo.js --description "Says it back"',
          'prints the file it wrote',
        ],
        [
          'millrace runtime descriptor --runtime ./echo.js --counter "echo.words=words:words said"',
          'priced by the words, once a preset has a coefficient for it',
        ],
        [
          'millrace runtime descriptor --runtime wasi --extra-arg=--runtime-managed-hardware',
          'one that is handed its image, and told the cores, memory and storage of the agreement',
        ],
      ]) + WHICH,
    )
    .action(action(session, descriptor));
  runtime
    .command('list')
    .description('list the runtimes that have a descriptor in the plugins folders')
    .option('--dir <dir>', 'a folder to look in instead of the standard ones; repeatable', repeatable)
    .addHelpText(
      'after',
      examples([['millrace runtime list', 'what --runtime NAME and golemRunner can use']]),
    )
    .action(action(session, list));
}

async function test(
  context: CommandContext,
  options: TimedOptions,
  words: readonly string[],
): Promise<ExitCode> {
  const { testRuntime } = await import('@millrace/runtime/supervisor');
  const { file, ...invocation } = await resolveInvocation(context, options, words);
  using stop = stopSignal(context);
  const result = await testRuntime({ ...invocation, runtimePath: file, signal: stop.signal });
  const passed = result.exitCode === 0;
  context.out.result({ runtime: file, passed, ...invocationDocument(result) }, () =>
    outputLines(result.stdout),
  );
  report(context, result);
  context.out.note(
    passed ? `passed in ${formatDuration(result.durationMs)}` : `failed: exit code ${result.exitCode}`,
  );
  return passed ? EXIT.done : EXIT.failed;
}

async function offer(
  context: CommandContext,
  options: TimedOptions,
  words: readonly string[],
): Promise<ExitCode> {
  const { offerOf } = await import('@millrace/runtime/supervisor');
  const { file, ...invocation } = await resolveInvocation(context, options, words);
  using stop = stopSignal(context);
  const { offer: template, ...result } = await offerOf({
    ...invocation,
    runtimePath: file,
    signal: stop.signal,
  });
  const failed = result.exitCode !== 0;
  context.out.result(
    { runtime: file, offer: failed ? null : template, exit_code: result.exitCode, stderr: result.stderr },
    () => (failed ? [] : JSON.stringify(template, null, 2).split('\n')),
  );
  report(context, result);
  if (failed)
    context.out.note(`failed: exit code ${result.exitCode}; a provider goes on with an empty template`);
  return failed ? EXIT.failed : EXIT.done;
}

async function deploy(
  context: CommandContext,
  options: DeployOptions,
  words: readonly string[],
): Promise<ExitCode> {
  const { io, out } = context;
  const { deployRuntime } = await import('@millrace/runtime/supervisor');
  const { file, args, env, timeoutMs } = await resolveInvocation(context, options, words);
  const workDir = path.resolve(io.cwd, options.workdir);
  using stop = stopSignal(context);
  const result = await deployRuntime({
    runtimePath: file,
    workDir,
    runtimeArgs: args,
    env,
    limits: { deployMs: timeoutMs },
    signal: stop.signal,
    request: {
      ...(options.volume && {
        volumes: Object.fromEntries(options.volume.map((one) => [one, { host: {} }])),
      }),
      ...(options.hostname !== undefined && { hostname: options.hostname }),
    },
    ...(options.taskPackage !== undefined && { taskPackage: path.resolve(io.cwd, options.taskPackage) }),
  });
  const { exitCode, mode, volumes } = result;
  const deployed = exitCode === 0;
  out.result(
    {
      runtime: file,
      workdir: workDir,
      ...(deployed && { mode, volumes }),
      exit_code: exitCode,
      stdout: result.stdout,
      stderr: result.stderr,
    },
    () =>
      deployed
        ? [
            `deployed in ${workDir}, ${mode} mode`,
            ...volumes.map(
              (volume) => `  ${oneLine(volume.path)}  ${oneLine(path.join(workDir, volume.name))}`,
            ),
          ]
        : outputLines(result.stdout),
  );
  report(context, result);
  if (!deployed) out.note(`failed: exit code ${exitCode}`);
  return deployed ? EXIT.done : EXIT.failed;
}

async function debug(
  context: CommandContext,
  options: DebugOptions,
  words: readonly string[],
): Promise<ExitCode> {
  const { io, out } = context;
  const [{ runDebugger }, { temporaryFolder }] = await Promise.all([
    import('@millrace/runtime/supervisor'),
    import('../temporary-folder.ts'),
  ]);
  const { file, args, env } = await resolveInvocation(context, options, words);
  const dataDir = resolveDataDir(context);
  const interactive = options.script === undefined && io.stdin.isTTY === true && !out.json;
  if (interactive) await ensureDataDir(dataDir);
  await using folder = options.workdir === undefined ? await temporaryFolder() : null;
  using stop = stopSignal(context);
  const exitCode = await runDebugger({
    runtimePath: file,
    workdir: folder?.path ?? path.resolve(io.cwd, options.workdir ?? ''),
    args,
    env,
    input: io.stdin,
    output: sessionOutput(context),
    signal: stop.signal,
    ...(options.protocol !== undefined && { protocol: options.protocol }),
    ...(options.taskPackage !== undefined && { taskPackage: path.resolve(io.cwd, options.taskPackage) }),
    ...(options.script !== undefined && { script: path.resolve(io.cwd, options.script) }),
    ...(options.trace === true && { trace: true }),
    ...(interactive && { historyFile: path.join(dataDir, 'runtime-dbg.history') }),
  });
  stop.signal.throwIfAborted();
  if (out.json) out.document({ runtime: file, script: options.script ?? null, exit_code: exitCode });
  return exitCode === 0 ? EXIT.done : EXIT.failed;
}

/** The session is the result, so it is on stdout; with `--json` that is the document's, and the session goes to stderr. */
function sessionOutput({ io, out }: CommandContext): Writable {
  // What a terminal can do is asked of the stream itself.
  if (!out.json && io.stdout instanceof Writable) return io.stdout;
  const target = out.json ? io.stderr : io.stdout;
  return new Writable({
    decodeStrings: false,
    write(text: string | Buffer, _encoding, done) {
      const room = target.write(String(text));
      // What waits to be read is to show here: the debugger leaves output out when it is too much.
      if (room === false && target instanceof Writable) target.once('drain', done);
      else done();
    },
  });
}

async function descriptor(context: CommandContext, options: DescriptorOptions): Promise<ExitCode> {
  const { io, out } = context;
  const { pluginDirs, writeDescriptor } = await import('@millrace/runtime/supervisor');
  const { file, brought } = await findRuntime(context, options.runtime);
  const written = await writeDescriptor({
    runtimePath: file,
    dir: options.dir === undefined ? pluginDirs(io.env)[0]! : path.resolve(io.cwd, options.dir),
    ...(options.name !== undefined && { name: options.name }),
    ...(options.runtimeVersion !== undefined && { version: options.runtimeVersion }),
    ...(options.supervisor !== undefined && { supervisorPath: options.supervisor }),
    ...(options.description !== undefined && { description: options.description }),
    ...(options.extraArg !== undefined && { extraArgs: options.extraArg }),
    // The one that comes with this program runs what it is handed.
    ...(options.extraArg === undefined && brought && { extraArgs: [] }),
    ...(options.property !== undefined && {
      properties: Object.fromEntries(options.property.map(parseProperty)),
    }),
    ...(options.counter !== undefined && { counters: Object.fromEntries(options.counter.map(parseCounter)) }),
  });
  const { file: target, name, version, runtimePath, supervisorPath, extraArgs } = written;
  out.result(
    {
      file: target,
      name,
      version,
      'runtime-path': runtimePath,
      'supervisor-path': supervisorPath,
      'extra-args': extraArgs,
    },
    () => [target],
  );
  out.note(`${name} ${version}; next: a preset with "exeunit-name": ${JSON.stringify(name)}`);
  return EXIT.done;
}

async function list(
  context: CommandContext,
  options: { readonly dir?: readonly string[] },
): Promise<ExitCode> {
  const { io, out } = context;
  const { listDescriptors } = await import('@millrace/runtime/supervisor');
  const { descriptors, problems } = listDescriptors({
    env: io.env,
    ...(options.dir && { dirs: options.dir.map((dir) => path.resolve(io.cwd, dir)) }),
  });
  out.result(
    {
      runtimes: descriptors.map((one) => ({
        name: one.name,
        version: one.version,
        description: one.description,
        'runtime-path': one.runtimePath,
        'supervisor-path': one.supervisorPath,
        'extra-args': one.extraArgs,
        file: one.file,
      })),
      problems,
    },
    () =>
      descriptors.length === 0
        ? ['no descriptors; "millrace runtime descriptor --runtime PATH" writes one']
        : table(
            [{ title: 'NAME' }, { title: 'VERSION' }, { title: 'RUNTIME' }, { title: 'DESCRIPTION' }],
            descriptors.map((one) => [
              oneLine(one.name),
              oneLine(one.version),
              oneLine(one.runtimePath ?? '-'),
              oneLine(one.description ?? '-'),
            ]),
            out.paint.dim,
          ),
  );
  for (const { file, message } of problems) out.note(`passed over ${file}: ${message}`);
  return EXIT.done;
}

interface ResolvedInvocation {
  readonly file: string;
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  readonly timeoutMs: number;
}

async function resolveInvocation(
  context: CommandContext,
  options: TimedOptions,
  words: readonly string[],
): Promise<ResolvedInvocation> {
  const { file, args } = await findRuntime(context, options.runtime);
  return {
    file,
    args: [...args, ...words],
    env: grantedVariables(context, options.env ?? []),
    timeoutMs: options.timeout === undefined ? 60_000 : parseDuration(options.timeout, '--timeout'),
  };
}

/** The program behind `--runtime`: a path, or the name of a descriptor. */
async function findRuntime({ io }: CommandContext, given: string): Promise<FoundRuntime> {
  const { runtimeFile } = await import('../runtime-file.ts');
  try {
    return { ...(await runtimeFile(given, io.cwd)), args: [] };
  } catch (error) {
    if (given.includes('/') || given.includes(path.sep)) throw error;
  }
  const { descriptorArgs, findDescriptor } = await import('@millrace/runtime/supervisor');
  let found;
  try {
    found = findDescriptor(given, { env: io.env });
  } catch (error) {
    throw new MillraceError('invalid_argument', `runtime ${given} is neither a file here nor known`, {
      cause: error,
    });
  }
  if (found.runtimePath === null) {
    throw new MillraceError('invalid_argument', `descriptor ${given} in ${found.file} has no runtime-path`);
  }
  return { file: found.runtimePath, args: descriptorArgs(found).runtimeArgs, brought: false };
}

interface FoundRuntime {
  readonly file: string;
  /** Words its descriptor puts before the subcommand. */
  readonly args: readonly string[];
  /** It came with this program. */
  readonly brought: boolean;
}

function grantedVariables({ io }: CommandContext, given: readonly string[]): Record<string, string> {
  return Object.fromEntries(
    given.map((text) => {
      const [name = '', ...rest] = text.split('=');
      const value = text.includes('=') ? rest.join('=') : io.env[name];
      if (name !== '' && value !== undefined) return [name, value];
      throw new MillraceError(
        'invalid_argument',
        `--env must be NAME=VALUE, or NAME of a variable that is set, got ${JSON.stringify(name)}`,
      );
    }),
  );
}

function parseProperty(text: string): [string, JsonObject[string]] {
  const at = text.indexOf('=');
  const value = text.slice(at + 1);
  if (at <= 0)
    throw new MillraceError('invalid_argument', `--property must be KEY=JSON, got ${JSON.stringify(text)}`);
  try {
    return [text.slice(0, at), JSON.parse(value) as JsonObject[string]];
  } catch (error) {
    throw new MillraceError(
      'invalid_argument',
      `--property ${text.slice(0, at)}: ${JSON.stringify(value)} is not JSON; a text needs its quotes`,
      {
        cause: error,
      },
    );
  }
}

function parseCounter(text: string): [string, JsonObject] {
  const [, id, name, description] = /^([^=]+)=([^:]+)(?::(.*))?$/s.exec(text) ?? [];
  if (id === undefined || name === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `--counter must be ID=NAME or ID=NAME:DESCRIPTION, got ${JSON.stringify(text)}`,
    );
  }
  return [id, { name, description: description ?? name, price: true }];
}

/** Aborts with `canceled` at a signal to stop. */
function stopSignal({ io }: CommandContext): Disposable & { readonly signal: AbortSignal } {
  const stop = new AbortController();
  const listening = io.onStop(() => stop.abort(new MillraceError('canceled', 'interrupted')));
  return { signal: stop.signal, [Symbol.dispose]: () => listening[Symbol.dispose]() };
}

function invocationDocument({ exitCode, stdout, stderr, durationMs }: InvocationResult): JsonObject {
  return { exit_code: exitCode, stdout, stderr, duration_ms: Math.round(durationMs) };
}

/** What it said beside its result. In the document it is already. */
function report({ out }: CommandContext, { stderr }: { readonly stderr: string }): void {
  if (!out.json) for (const line of outputLines(stderr)) out.note(line);
}

function outputLines(text: string): string[] {
  return text === '' ? [] : text.replace(/\n$/, '').split('\n');
}
