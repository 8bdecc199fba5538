/**
 * What the engine's thread and a runner's thread say to each other over their private MessagePort.
 *
 * One task at a time per thread. Every message of a task carries its number, so that what a task left behind
 * is never taken for the next one's. `id` pairs a call with its answer and also names the byte stream that
 * belongs to the call; the runner's side numbers them.
 *
 * The port is taken out of `workerData` before any user code is loaded, so a module cannot reach it: what it
 * posts to `parentPort` goes nowhere.
 */
import type { MessagePort } from 'node:worker_threads';
import type { AbortReason, Json, JsonObject, LeaseEnvelope, LogLevel } from '@millrace/runner';
import type { StreamMessage } from './byte-streams.ts';
import type { WireError } from './wire-error.ts';

/** What a new thread is started with. The engine may not put secrets here: modules can read `workerData`. */
export interface ThreadData {
  /** File URL of the module. */
  readonly module: string;
  /**
   * `tsx` for TypeScript, with the tsconfig.json to use or null for none; plain modules do not pay for it.
   */
  readonly loader: { readonly kind: 'node' } | { readonly kind: 'tsx'; readonly tsconfig: string | null };
  /** The module has no `@millrace/runner` beside it and gets ours. */
  readonly lendsContract: boolean;
  /** Output kept outside of tasks, in bytes: while loading, and of stragglers. */
  readonly strayLogBytes: number;
  ports?: ThreadPorts;
}

export interface ThreadPorts {
  readonly main: MessagePort;
  /** Carries tokens to a thread that waits for one synchronously. */
  readonly token: MessagePort;
  /** `Int32Array` over shared memory, indexed by {@link FLAG}. */
  readonly flags: Int32Array;
}

export const FLAG = {
  /** Number of the task that was aborted last. Set after the message about it was posted. */
  abortedTask: 0,
  /** Counts answers on the token port; waited on with `Atomics.wait`. */
  tokenAnswers: 1,
} as const;

export type ToThread =
  | { readonly t: 'run'; readonly task: number; readonly lease: LeaseEnvelope; readonly logBytes: number }
  | { readonly t: 'abort'; readonly task: number; readonly reason: AbortReason; readonly message: string }
  | { readonly t: 'answer'; readonly id: number; readonly value: unknown }
  | { readonly t: 'refusal'; readonly id: number; readonly error: WireError }
  /** The last {@link Notes} were taken in; the next may be sent. */
  | { readonly t: 'noted'; readonly task: number }
  | { readonly t: 'close' }
  | StreamMessage;

export type ToEngine =
  /** `thread`: the kernel's number of it, where it tells. */
  | { readonly t: 'loaded'; readonly capability: string; readonly thread: number | null }
  | { readonly t: 'load-failed'; readonly error: WireError }
  | { readonly t: 'call'; readonly task: number; readonly id: number; readonly call: Call }
  /** The caller's own signal aborted; the answer is no longer wanted. */
  | { readonly t: 'cancel'; readonly id: number }
  | Notes
  | { readonly t: 'settled'; readonly task: number; readonly error: WireError | null }
  /** Something was thrown that no `run` rejected with. `task` is null where it cannot be told. */
  | { readonly t: 'stray'; readonly task: number | null; readonly error: WireError }
  | { readonly t: 'closed'; readonly error: WireError | null }
  | StreamMessage;

/** One call of a port. Bytes are always a copy made for the message, so they can be transferred. */
export type Call =
  | { readonly method: 'getBytesByCid'; readonly cid: string }
  | { readonly method: 'materializeCidToTemp'; readonly cid: string }
  | { readonly method: 'materializeCidWithMeta'; readonly cid: string }
  | { readonly method: 'openRead'; readonly cid: string }
  | { readonly method: 'putBytes'; readonly path: string; readonly bytes: Uint8Array }
  | { readonly method: 'putFile'; readonly path: string; readonly file: string }
  | { readonly method: 'putStream'; readonly path: string }
  | { readonly method: 'openMultipart'; readonly path: string }
  | { readonly method: 'writeChunk'; readonly upload: number; readonly bytes: Uint8Array }
  | { readonly method: 'finish'; readonly upload: number }
  | { readonly method: 'abort'; readonly upload: number }
  | { readonly method: 'putDomainArtifact'; readonly artifact: WireArtifact };

export interface WireArtifact {
  readonly rel_path: string;
  readonly name: string;
  readonly data_type: string;
  readonly existing_id: string | null;
  /** `stream`: the bytes flow as the call's own byte stream. */
  readonly content: { readonly bytes: Uint8Array } | { readonly file: string } | { readonly stream: true };
}

/** What a task tells without waiting for an answer, in order. At most one batch is under way. */
export interface Notes {
  readonly t: 'notes';
  /** null: said outside of any task. */
  readonly task: number | null;
  readonly notes: readonly Note[];
}

export type Note =
  | { readonly kind: 'progress'; readonly value: Json }
  | { readonly kind: 'event'; readonly value: Json }
  | {
      readonly kind: 'log';
      readonly level: LogLevel;
      readonly message: string;
      readonly fields: JsonObject;
    };

/** What a thread asks over the token port, and hears there. */
export interface TokenRequest {
  readonly task: number;
}
export type TokenAnswer = { readonly token: string } | { readonly error: WireError };
