/**
 * The thread guests run in. It sleeps in `Atomics.wait` rather than in its event loop: a call gets here sooner, and there is
 * nothing else to be heard. It can be terminated at any moment.
 */
import { receiveMessageOnPort, workerData } from 'node:worker_threads';
import { MillraceError } from '@millrace/runner';
import { jsonProblem } from '../json-text.ts';
import type { GuestCall, GuestEngine, GuestFailure, GuestLimits, Library } from './guest-engine.ts';
import { GuestLog } from './guest-log.ts';
import type { Definition, GuestData, GuestMessage, Job } from './protocol.ts';
import { PHASE, Slot, nanosecondsOf, stateOf } from './slot.ts';

/** What a job asks for, as this thread keeps it: instances of one Module object are cheaper than of its clones. */
interface Code {
  readonly engine: GuestEngine;
  readonly key: string;
  readonly source: Uint8Array;
  readonly libraries: readonly Library[];
  prepared: unknown;
}

const { port, slot: shared, preload } = workerData as GuestData;
const slot = new Slot(shared);
const engines = new Map<string, GuestEngine>();
const codes = new Map<number, Code>();

let current = 0;
const log = new GuestLog(
  (bytes) => send({ kind: 'log', call: current, bytes }, bytes),
  () => performance.now(),
);
const note = (memoryBytes: number, outputBytes: number): void => slot.note(memoryBytes, outputBytes);
const write = (bytes: Uint8Array): void => log.write(bytes);

function send(message: GuestMessage, transfer?: Uint8Array<ArrayBuffer>): void {
  if (transfer === undefined) port.postMessage(message);
  else port.postMessage(message, [transfer.buffer]);
}

async function engineOf(url: string): Promise<GuestEngine> {
  const known = engines.get(url);
  if (known !== undefined) return known;
  const { guest } = (await import(url)) as { readonly guest: GuestEngine };
  engines.set(url, guest);
  return guest;
}

async function define(number: number, { engine, ...rest }: Definition): Promise<Code> {
  const code: Code = { engine: await engineOf(engine), ...rest };
  codes.set(number, code);
  return code;
}

type Call = Pick<Job, 'call' | 'input'>;

/** One call from its arrival to its report. Throws when the engine itself fails: then the thread ends. */
function perform(code: Code, job: Call): void {
  current = job.call;
  const { limits } = slot;
  log.begin(limits.maxLogBytes);
  let prepareMs = 0;
  if (code.prepared === undefined) {
    const begun = performance.now();
    const failure = prepare(code, limits);
    prepareMs = performance.now() - begun;
    if (failure !== null) {
      end(job, PHASE.preparing, prepareMs, 0, null, failure);
      return;
    }
    send({ kind: 'prepared', call: job.call, prepared: code.prepared });
  }
  if (!slot.start(job.call, nanosecondsOf(limits.maxWallMs))) return;
  const begun = performance.now();
  const call: GuestCall = { key: code.key, input: job.input, limits, log: write, note };
  const outcome = code.engine.run(code.prepared as never, call);
  const result = outcome.failure ?? checked(outcome.output);
  slot.note(outcome.memoryBytes, outcome.outputBytes);
  end(job, PHASE.running, prepareMs, performance.now() - begun, outcome.fuelUsed, result);
}

function prepare(code: Code, limits: GuestLimits): GuestFailure | null {
  try {
    code.prepared = code.engine.prepare(code.source, limits, code.libraries);
    return null;
  } catch (error) {
    if (!MillraceError.is(error)) throw error;
    const { reason, ...details } = error.details as { readonly reason: GuestFailure['reason'] };
    return { code: error.code, reason, message: error.message, details };
  }
}

/** The output held to be JSON. */
function checked(output: Uint8Array<ArrayBuffer> | null): Uint8Array<ArrayBuffer> | GuestFailure {
  if (output === null || output.length === 0) return new TextEncoder().encode('{}');
  const problem = jsonProblem(output);
  if (problem === null) return output;
  return {
    code: 'invalid_argument',
    reason: 'bad-output',
    message: `guest output is not one JSON document: ${problem}`,
  };
}

/** Reports, unless the call has been ended from outside. */
function end(
  job: Call,
  phase: number,
  prepareMs: number,
  wallMs: number,
  fuelUsed: number | null,
  result: Uint8Array<ArrayBuffer> | GuestFailure,
): void {
  slot.measure({ prepareMs, wallMs, logBytes: log.bytes, logDroppedBytes: log.droppedBytes, fuelUsed });
  const small = result instanceof Uint8Array && slot.giveResult(result);
  if (!slot.move(stateOf(job.call, phase), PHASE.idle)) return;
  log.flush();
  if (small) send(job.call);
  else if (result instanceof Uint8Array) send({ kind: 'done', call: job.call, output: result }, result);
  else send({ kind: 'failed', call: job.call, failure: result, logExcerpt: log.excerpt() });
}

for (const url of preload) (await engineOf(url)).warmUp?.();
slot.ready();
send({ kind: 'ready' });
/** What ran last: asked for twice in a row, it is likely to be asked for again. */
let last: Code | null = null;
for (;;) {
  // One wake for each call, and nothing else wakes it.
  slot.sleep();
  const small = slot.takeJob();
  let code: Code | undefined;
  if (small === null) {
    const job = receiveMessageOnPort(port)?.message as Job | undefined;
    if (job === undefined) throw new Error('woken without a job');
    if (job.forget !== undefined) codes.delete(job.forget);
    code = job.define === undefined ? codes.get(job.code) : await define(job.code, job.define);
    perform(known(code, job.code), job);
  } else {
    code = codes.get(small.code);
    perform(known(code, small.code), small);
  }
  if (code === last && code?.prepared !== undefined) code.engine.ahead?.(code.prepared as never);
  last = code ?? null;
}

function known(code: Code | undefined, number: number): Code {
  if (code === undefined) throw new Error(`code ${number} was never defined`);
  return code;
}
