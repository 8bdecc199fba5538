/**
 * The entry of a runner's thread: loads one module, then performs one task after the other.
 *
 * Errors no `run` rejects with (a throw in a timer, a rejection nobody handles) are caught here and reported
 * with the task they belong to, found through the async context they came from. So what an earlier task left
 * behind cannot fail the one that runs now, and the engine can put the thread away afterwards.
 */
import { AsyncLocalStorage } from 'node:async_hooks';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { workerData } from 'node:worker_threads';
import { MillraceError, checkCapability } from '@millrace/runner';
import type { Runner } from '@millrace/runner';
import type { Post } from './byte-streams.ts';
import { OutputLines, captureOutput } from './output-lines.ts';
import type { ThreadData, ToEngine, ToThread } from './protocol.ts';
import { ThreadTask } from './task-context.ts';
import { threadNumber } from './thread-meter.ts';
import { encodeError } from './wire-error.ts';

interface Work {
  readonly task: ThreadTask;
  readonly output: OutputLines;
}

const data = workerData as ThreadData;
const ports = data.ports!;
// Out of reach of the module that is about to be loaded, as is the method it might replace.
delete data.ports;
const post = ports.main.postMessage.bind(ports.main) as Post<ToEngine>;

const attribution = new AsyncLocalStorage<Work>();
let running: Work | null = null;
let runner: Runner;
const thread = threadNumber();

const strayOutput = new OutputLines(data.strayLogBytes, (note) =>
  post({ t: 'notes', task: null, notes: [note] }),
);
captureOutput((stream, bytes) => {
  const work = attribution.getStore() ?? running;
  (work !== null && work === running ? work.output : strayOutput).write(stream, bytes);
});

const onStray = (thrown: unknown): void =>
  post({ t: 'stray', task: attribution.getStore()?.task.task ?? null, error: encodeError(thrown) });
process.on('uncaughtException', onStray);
process.on('unhandledRejection', onStray);

ports.main.on('message', (message: ToThread) => {
  if (message.t === 'run') void run(message);
  else if (message.t === 'close') void close();
  else running?.task.handle(message);
});

// Not awaited here: V8 ends the process when a thread is terminated just as a module with top-level await is
// entered.
void start();

async function start(): Promise<void> {
  try {
    runner = await load();
    post({ t: 'loaded', capability: runner.capability, thread });
  } catch (error) {
    post({ t: 'load-failed', error: encodeError(error) });
  }
}

async function load(): Promise<Runner> {
  process.setSourceMapsEnabled(true);
  if (data.lendsContract) {
    const { provideContract } = await import('./contract-fallback.ts');
    provideContract();
  }
  if (data.loader.kind === 'tsx') await registerTypeScript(data.loader.tsconfig);
  const exported = (await import(data.module)) as { readonly default?: unknown };
  // A CommonJS module compiled from `export …` arrives with its exports as the default, and says what it was.
  const outer = exported.default as { readonly default?: unknown; readonly __esModule?: unknown } | undefined;
  return checkRunner(isRunnerLike(outer?.default) || outer?.__esModule === true ? outer?.default : outer);
}

/**
 * TypeScript through tsx: type stripping of newer Nodes knows neither enums nor tsconfig paths, and one
 * behaviour on every Node is worth its 200 ms. Both of its halves are needed: a .ts file in a folder whose
 * package.json does not say `"type": "module"` is CommonJS to it.
 */
async function registerTypeScript(tsconfig: string | null): Promise<void> {
  if (tsconfig !== null) process.env['TSX_TSCONFIG_PATH'] = tsconfig;
  const [esm, cjs] = await Promise.all([import('tsx/esm/api'), import('tsx/cjs/api')]);
  cjs.register();
  esm.register({ tsconfig: tsconfig ?? false });
  delete process.env['TSX_TSCONFIG_PATH'];
}

function isRunnerLike(value: unknown): boolean {
  return typeof value === 'object' && value !== null && 'run' in value && 'capability' in value;
}

function checkRunner(value: unknown): Runner {
  const advice =
    'end it with `export default defineRunner({ capability: "/my/work/v1", async run(ctx) { … } })`';
  if (value === undefined || value === null) {
    throw new MillraceError('invalid_argument', `has no default export; ${advice}`);
  }
  if (typeof value !== 'object') {
    throw new MillraceError(
      'invalid_argument',
      `its default export is a ${typeof value}, not a runner; ${advice}`,
    );
  }
  const candidate = value as Partial<Runner>;
  checkCapability(candidate.capability);
  if (typeof candidate.run !== 'function') {
    throw new MillraceError(
      'invalid_argument',
      `its default export has no run function (run is ${typeof candidate.run}); ${advice}`,
    );
  }
  return value as Runner;
}

async function run(message: Extract<ToThread, { t: 'run' }>): Promise<void> {
  const task = new ThreadTask(message.task, message.lease, ports, post);
  const output = new OutputLines(message.logBytes, (note) => task.addOutput(note));
  const work = { task, output };
  running = work;
  let failure: ReturnType<typeof encodeError> | null = null;
  try {
    await attribution.run(work, async () => await runner.run(task.context));
    await task.finishOutputs();
  } catch (thrown) {
    failure = encodeError(thrown);
  }
  // A rejection that nobody handled is announced within this turn, and so before the end of the task it
  // belongs to.
  await nextTurn();
  output.end();
  task.close();
  running = null;
  post({ t: 'settled', task: task.task, error: failure });
}

async function close(): Promise<void> {
  try {
    await runner.close?.();
    post({ t: 'closed', error: null });
  } catch (error) {
    post({ t: 'closed', error: encodeError(error) });
  }
}
