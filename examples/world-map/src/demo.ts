/**
 * `npm run demo [-- FILE]`: starts a dispatcher and two nodes, uploads the data, submits the job, shows it run, and puts
 * the picture where it can be looked at.
 */
import { createHash } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { mkdir, mkdtemp, readFile, rename, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { connect } from '@millrace/dispatch/client';
import type { ArtifactReport, Requestor } from '@millrace/dispatch/client';
import { MillraceError, TaskAbort, describeError, sleep, systemClock } from '@millrace/runner';
import { readFeatures } from './geo.ts';
import { buildJob } from './job.ts';
import { JobBoard } from './job-board.ts';
import { startLocalSystem } from './local-system.ts';
import type { LocalSystem } from './local-system.ts';
import { planMap } from './plan.ts';
import type { MapPlan } from './plan.ts';

const USAGE = `usage: npm run demo -- [FILE] [options]

Draws the world with a job of three stages on a dispatcher and nodes started for it.

  FILE            GeoJSON or TopoJSON to draw over the map
  --fit           show the extent of FILE instead of the world
  --size PIXELS   width of the picture, 64 to 65536; it is half as high (default 8192)
  --tiles CxR     columns and rows it is cut into (default 8x4)
  --nodes N       compute nodes to start, 1 to 8 (default 2)
  --out DIR       where map.png and map.json go (default out/world-map)
`;

/** Larger files would not fit into the memory the runners get, once parsed. */
const MAX_FILE_BYTES = 64 * 1024 * 1024;

interface Options {
  readonly plan: MapPlan;
  readonly nodes: number;
  readonly out: string;
  readonly file: { readonly name: string; readonly bytes: Uint8Array } | null;
}

/** Everything that can be wrong with what was asked for is found here, before anything is started. */
async function readOptions(args: readonly string[]): Promise<Options | 'help'> {
  const { values, positionals } = parseCommandLine(args);
  if (values.help) return 'help';
  if (positionals.length > 1) throw usage(`one file at most, got ${positionals.length}`);
  const integer = (name: string, text: string, min: number, max: number): number => {
    const value = /^\d+$/.test(text) ? Number(text) : NaN;
    if (value >= min && value <= max) return value;
    throw usage(`--${name} must be an integer from ${min} to ${max}, got ${JSON.stringify(text)}`);
  };
  const tiles = /^(\d{1,4})x(\d{1,4})$/.exec(values.tiles);
  if (!tiles) throw usage(`--tiles must be COLUMNSxROWS, such as 8x4, got ${JSON.stringify(values.tiles)}`);
  const [path] = positionals;
  if (values.fit && path === undefined) throw usage('--fit needs a file to fit to');
  const grid = { columns: Number(tiles[1]), rows: Number(tiles[2]) };
  const plan = planMap(integer('size', values.size, 64, 65_536), grid, values.fit);
  const file = path === undefined ? null : { name: basename(path), bytes: await readUserFile(path) };
  if (file) readFeatures(file.bytes, file.name);
  return { plan, nodes: integer('nodes', values.nodes, 1, 8), out: fromHere(values.out), file };
}

function parseCommandLine(args: readonly string[]) {
  try {
    return parseArgs({
      args: [...args],
      allowPositionals: true,
      options: {
        size: { type: 'string', default: '8192' },
        tiles: { type: 'string', default: '8x4' },
        nodes: { type: 'string', default: '2' },
        out: { type: 'string', default: 'out/world-map' },
        fit: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
    });
  } catch (error) {
    throw usage(describeError(error));
  }
}

async function readUserFile(path: string): Promise<Uint8Array> {
  const full = fromHere(path);
  try {
    const { size } = await stat(full);
    if (size > MAX_FILE_BYTES) {
      throw usage(`${path} must be at most ${MAX_FILE_BYTES} bytes, got ${size}; simplify it first`);
    }
    return await readFile(full);
  } catch (cause) {
    if (MillraceError.is(cause)) throw cause;
    throw new MillraceError('invalid_argument', `cannot read ${full}`, { cause });
  }
}

/** Paths are meant from where the person is, which npm changes and tells. */
function fromHere(path: string): string {
  return resolve(process.env['INIT_CWD'] ?? process.cwd(), path);
}

function usage(message: string): MillraceError {
  return new MillraceError('invalid_argument', `${message}\n\n${USAGE}`);
}

/** The finest atlas whose detail the picture can show. */
function atlasFor({ size, fit }: MapPlan): string {
  const scale = fit || size.width >= 4096 ? '10m' : size.width >= 1024 ? '50m' : '110m';
  return `countries-${scale}.json`;
}

/** Runs it all. Resolves with the exit code. */
async function main({ plan, nodes, out, file }: Options, interrupts: Interrupts): Promise<number> {
  const { signal } = interrupts;
  const dir = await mkdtemp(join(tmpdir(), 'millrace-demo-'));
  try {
    say(`starting a dispatcher and ${nodes} node${nodes === 1 ? '' : 's'}`);
    const runners = ['prepare', 'tile', 'stitch'].map((name) =>
      fileURLToPath(new URL(`./runners/${name}.js`, import.meta.url)),
    );
    await using system = await startLocalSystem({ dir, nodes, runners, signal });
    interrupts.onSecond(() => system.kill());
    const requestor = connect({ url: system.url, token: system.token });
    try {
      const name = atlasFor(plan);
      const atlas = await readFile(fileURLToPath(import.meta.resolve(`world-atlas/${name}`)));
      const { domainId } = await requestor.health({ signal });
      const upload = async (dataName: string, bytes: Uint8Array): Promise<string> => {
        const id = await requestor.upload(bytes, { name: dataName, dataType: 'json', signal });
        say(`uploaded ${dataName}, ${bytes.length} bytes`);
        return id;
      };
      const inputs = {
        atlas: await upload(`atlas-${name.replaceAll('.', '-')}`, atlas),
        overlay: file ? await upload('features-json', file.bytes) : null,
      };
      const jobId = await requestor.submit(buildJob(plan, inputs), { signal });
      say(`submitted job ${jobId}: ${plan.grid.columns * plan.grid.rows + 2} tasks\n`);
      const following = follow(requestor, system, jobId, plan, signal);
      // When a process dies this ends at once, and what is then still followed is of no interest.
      following.catch(() => undefined);
      const board = await Promise.race([following, system.failed]);
      const { job, tasks } = await requestor.job(jobId, { signal });
      if (job.status !== 'completed') {
        const reasons = tasks
          .filter(({ status }) => status === 'failed')
          .map(({ label, reason }) => `${label}: ${reason}`);
        throw new MillraceError('aborted', `the job ${job.status}\n${reasons.slice(0, 5).join('\n')}`);
      }
      say(
        `timeline, from submission to the end:\n\n${board.timeline(process.stdout.columns || 100).join('\n')}\n`,
      );
      const picture = await fetchResults(requestor, domainId, jobId, out, signal);
      say(`the map: ${picture} (${plan.size.width} x ${plan.size.height})`);
      return 0;
    } finally {
      await requestor.close();
    }
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
}

/** Shows the job until it has ended. On an interrupt, cancels it, waits for that to be done, and throws. */
async function follow(
  requestor: Requestor,
  { nodeNames }: LocalSystem,
  jobId: string,
  { grid }: MapPlan,
  signal: AbortSignal,
): Promise<JobBoard> {
  const board = new JobBoard(await requestor.job(jobId, { signal }), nodeNames);
  const screen = new Screen();
  try {
    for await (const event of requestor.events(jobId, { signal })) {
      const line = board.apply(event);
      if (screen.isTerminal) screen.draw(board.board(grid.columns));
      else if (line !== null) say(line);
    }
    screen.done();
    return board;
  } catch (error) {
    screen.done();
    if (signal.aborted) {
      say('canceling the job');
      await cancelAndWait(requestor, jobId);
    }
    throw error;
  }
}

async function cancelAndWait(requestor: Requestor, jobId: string): Promise<void> {
  const limit = new AbortController();
  const late = sleep(systemClock, 10_000, limit.signal).catch(() => undefined);
  const ended = (async () => {
    await requestor.cancel(jobId, { signal: limit.signal });
    const events = requestor.events(jobId, { signal: limit.signal })[Symbol.asyncIterator]();
    while (!(await events.next()).done);
  })();
  try {
    await Promise.race([ended, late]);
  } finally {
    limit.abort();
    // Stopped by the line above, when the cancelled work took too long to end.
    await ended.catch(() => undefined);
  }
}

/** Downloads what the last stage wrote. Resolves with the path of the picture. */
async function fetchResults(
  requestor: Requestor,
  domainId: string,
  jobId: string,
  out: string,
  signal: AbortSignal,
): Promise<string> {
  const { tasks, receipts } = await requestor.job(jobId, { signal });
  const stitch = tasks.find(({ stage }) => stage === 'stitch');
  const receipt = receipts.find(({ task_id, outcome }) => task_id === stitch?.id && outcome === 'completed');
  const { artifacts = [] } = (receipt?.meta ?? {}) as { readonly artifacts?: readonly ArtifactReport[] };
  await mkdir(out, { recursive: true });
  for (const name of ['map.png', 'map.json']) {
    const id = artifacts.find(({ logical_path }) => logical_path === name)?.id;
    if (typeof id !== 'string') throw new MillraceError('not_found', `the job's artifacts have no ${name}`);
    await download(requestor, domainId, id, join(out, name), signal);
  }
  return join(out, 'map.png');
}

/** To a file beside it first, so that a picture under its name is always a whole one. */
async function download(
  requestor: Requestor,
  domainId: string,
  id: string,
  path: string,
  signal: AbortSignal,
): Promise<void> {
  const { body, digest } = await requestor.storage.openRaw(domainId, id, undefined, { signal });
  const partial = `${path}.partial`;
  const hash = createHash('sha256');
  try {
    await pipeline(
      body,
      async function* (source: AsyncIterable<Uint8Array>) {
        for await (const chunk of source) {
          hash.update(chunk);
          yield chunk;
        }
      },
      createWriteStream(partial),
      { signal },
    );
    const got = `sha256:${hash.digest('hex')}`;
    if (digest !== null && digest !== got) {
      throw new MillraceError('data_loss', `${basename(path)} must have the digest ${digest}, got ${got}`);
    }
    await rename(partial, path);
  } catch (error) {
    await rm(partial, { force: true });
    throw error;
  }
}

/** The part of a terminal that is drawn over and over. */
class Screen {
  readonly isTerminal = process.stdout.isTTY;
  #lines = 0;

  draw(lines: readonly string[]): void {
    const width = process.stdout.columns || 80;
    const up = this.#lines > 0 ? `\u001b[${this.#lines}A` : '';
    const text = lines.map((line) => `\u001b[2K${line.slice(0, width - 1)}\n`).join('');
    process.stdout.write(up + text);
    this.#lines = lines.length;
  }

  done(): void {
    if (this.#lines > 0) process.stdout.write('\n');
    this.#lines = 0;
  }
}

/** Ctrl-C: the first time aborts the signal, the second time does what is registered, and ends the program. */
class Interrupts {
  readonly #controller = new AbortController();
  #second = (): void => undefined;

  constructor() {
    for (const name of ['SIGINT', 'SIGTERM'] as const) {
      process.on(name, () => {
        if (!this.#controller.signal.aborted) {
          this.#controller.abort(new TaskAbort('canceled', 'interrupted'));
          return;
        }
        this.#second();
        process.exit(3);
      });
    }
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  onSecond(act: () => void): void {
    this.#second = act;
  }
}

function say(text: string): void {
  process.stdout.write(`${text}\n`);
}

const interrupts = new Interrupts();
try {
  const options = await readOptions(process.argv.slice(2));
  if (options === 'help') say(USAGE);
  else process.exitCode = await main(options, interrupts);
} catch (error) {
  if (interrupts.signal.aborted) {
    say('interrupted');
    process.exitCode = 3;
  } else {
    process.stderr.write(`demo: ${describeError(error, 16_384)}\n`);
    process.exitCode = MillraceError.is(error) && error.code === 'invalid_argument' ? 2 : 1;
  }
}
// The last of what keeps the process alive are the signal handlers' own watchers.
process.removeAllListeners('SIGINT').removeAllListeners('SIGTERM');
