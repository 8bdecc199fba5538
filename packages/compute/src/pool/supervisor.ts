/**
 * The thread that owns the guest workers. Only the thread that started a worker can terminate it, and the caller's may be
 * busy just when a guest has to die; this one never runs anything long.
 *
 * While calls run it looks at them at least every 10 ms and exactly at the nearest deadline. It falls asleep after
 * a while without any.
 */
import { MessageChannel, Worker, parentPort, workerData } from 'node:worker_threads';
import type { SupervisorData, SupervisorMessage, SupervisorRequest, GuestData } from './protocol.ts';
import { Shelf } from './shelf.ts';
import { Attention, PHASE, Slot, milliseconds, phaseOf, withPhase } from './slot.ts';

const LOOK_MS = 10;
const LOOKS_BEFORE_SLEEP = 20;

interface Guest {
  readonly id: number;
  readonly worker: Worker;
  readonly slot: Slot;
  dying: boolean;
}

const { attention: shared, workers, preload } = workerData as SupervisorData;
const attention = new Attention(shared);
const engines = new Set(preload);
const shelf = new Shelf();
const guests = new Map<number, Guest>();
let lastId = 0;
let idleLooks = 0;
let timer: NodeJS.Timeout | null = null;

function send(message: SupervisorMessage, transfer: readonly MessageChannel['port1'][] = []): void {
  parentPort?.postMessage(message, transfer);
}

function fill(): void {
  while (guests.size < workers) spawn();
}

function spawn(): void {
  lastId += 1;
  const id = lastId;
  const { port1, port2 } = new MessageChannel();
  const slot = new Slot();
  const data: GuestData = { port: port2, slot: slot.shared, shelf: shelf.shared, preload: [...engines] };
  const worker = new Worker(new URL('./guest-worker.js', import.meta.url), {
    name: 'millrace-compute-guest',
    workerData: data,
    transferList: [port2],
    // Nothing of the process is handed on, and nothing a guest's host code prints gets out of here.
    env: {},
    argv: [],
    execArgv: [],
    stdout: true,
    stderr: true,
    // Fixed, so that how deep a guest may recurse does not depend on the machine's settings.
    resourceLimits: { stackSizeMb: 4, maxOldGenerationSizeMb: 128 },
  });
  worker.stdout.resume();
  worker.stderr.resume();
  const guest: Guest = { id, worker, slot, dying: false };
  guests.set(id, guest);
  let error: string | null = null;
  worker.on('error', (cause: unknown) => (error = cause instanceof Error ? cause.message : String(cause)));
  worker.on('exit', () => {
    guests.delete(id);
    const booted = phaseOf(slot.state) !== PHASE.booting;
    send({ kind: 'gone', guest: id, booted, error });
    // One that could not start would be followed by others: then the next call asks again.
    if (booted) fill();
  });
  send({ kind: 'guest', guest: id, port: port1, slot: slot.shared }, [port1]);
}

function kill(guest: Guest): void {
  if (guest.dying) return;
  guest.dying = true;
  guest.slot.ended();
  // Its end is heard of by 'exit', and only then is it replaced: a thread that starts would slow one that ends.
  void guest.worker.terminate();
}

/** Ends what is late; returns how long nothing can be, or `null` when nothing runs. */
function look(): number | null {
  let nextMs: number | null = null;
  const now = process.hrtime.bigint();
  for (const guest of guests.values()) {
    if (guest.dying) continue;
    const { state } = guest.slot;
    const phase = phaseOf(state);
    if (phase !== PHASE.preparing && phase !== PHASE.running) continue;
    const left = guest.slot.deadlineNs - now;
    if (left <= 0n) {
      if (guest.slot.move(state, withPhase(state, PHASE.late))) kill(guest);
      continue;
    }
    nextMs = Math.min(nextMs ?? LOOK_MS, milliseconds(left));
  }
  return nextMs;
}

function watch(): void {
  timer = null;
  let nextMs = look();
  if (nextMs === null) {
    idleLooks += 1;
    if (idleLooks > LOOKS_BEFORE_SLEEP) {
      attention.fallAsleep();
      // A call may have been posted just before: its caller saw us awake.
      nextMs = look();
      if (nextMs === null || !attention.claimWake()) return;
    }
  }
  if (nextMs !== null) idleLooks = 0;
  timer = setTimeout(watch, Math.max(1, Math.ceil(nextMs ?? LOOK_MS)));
}

parentPort?.on('message', (request: SupervisorRequest) => {
  switch (request.kind) {
    case 'wake':
      idleLooks = 0;
      if (timer === null) watch();
      return;
    case 'kill': {
      const guest = guests.get(request.guest);
      if (guest !== undefined) kill(guest);
      return;
    }
    case 'preload':
      engines.add(request.engine);
      return;
    case 'fill':
      fill();
  }
});

fill();
watch();
