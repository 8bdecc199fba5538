/** The messages between a caller, the supervisor and the guest workers. All three come from one package, so none is checked. */
import type { MessagePort } from 'node:worker_threads';
import type { GuestFailure, Library } from './guest-engine.ts';

/** What a guest worker is started with. */
export interface GuestData {
  readonly port: MessagePort;
  readonly slot: SharedArrayBuffer;
  /** See `shelf.ts`. */
  readonly shelf: SharedArrayBuffer;
  /** Engine modules to import before saying ready. */
  readonly preload: readonly string[];
}

/** What the supervisor is started with. */
export interface SupervisorData {
  readonly attention: SharedArrayBuffer;
  readonly workers: number;
  readonly preload: readonly string[];
}

/** Caller to guest, where the job is not small or the code not known. The limits are in the slot. */
export interface Job {
  readonly call: number;
  /** Number of the code to run. */
  readonly code: number;
  /** What the code is; sent to each guest once. */
  readonly define: Definition | undefined;
  /** Code this guest will not be asked to run again. */
  readonly forget: number | undefined;
  readonly input: Uint8Array;
}

export interface Definition {
  /** URL of the engine's worker side. */
  readonly engine: string;
  readonly key: string;
  /** What `prepare` made of the source in another worker, if one did. */
  readonly prepared: unknown;
  readonly source: Uint8Array;
  readonly libraries: readonly Library[];
}

/** Guest to caller. Numbers are in the slot. */
export type GuestMessage =
  /** The call of that number is done, and its output in the slot. */
  | number
  | { readonly kind: 'ready' }
  | { readonly kind: 'log'; readonly call: number; readonly bytes: Uint8Array }
  | { readonly kind: 'done'; readonly call: number; readonly output: Uint8Array }
  | {
      readonly kind: 'failed';
      readonly call: number;
      readonly failure: GuestFailure;
      /** Beginning and end of the diagnostics, for the error text. */
      readonly logExcerpt: string;
    }
  /** Before the report of a call for which code was prepared: for other guests. */
  | { readonly kind: 'prepared'; readonly call: number; readonly prepared: unknown };

/** Caller to supervisor. */
export type SupervisorRequest =
  | { readonly kind: 'wake' }
  /** A canceled call. */
  | { readonly kind: 'kill'; readonly guest: number }
  /** Later guests import this too. */
  | { readonly kind: 'preload'; readonly engine: string }
  /** Have as many guests as there should be: after one could not be started. */
  | { readonly kind: 'fill' };

/** Supervisor to caller. */
export type SupervisorMessage =
  | {
      readonly kind: 'guest';
      readonly guest: number;
      readonly port: MessagePort;
      readonly slot: SharedArrayBuffer;
    }
  /** The thread no longer exists. */
  | {
      readonly kind: 'gone';
      readonly guest: number;
      readonly booted: boolean;
      readonly error: string | null;
    };
