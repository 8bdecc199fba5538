/** What the tasks of the fault rounds do, and how their results are told from others. */
import { createHash } from 'node:crypto';

export const CAPABILITY = '/faults/work/v1';
/** The artifact every attempt makes under the same name. */
export const OUTPUT = 'out.bin';
/** Begins the name of the artifact that names the attempt. */
export const NONCE_PREFIX = 'attempt/';

/** `meta` of a task. */
export interface Work {
  /** Of each input; null: not checked. */
  readonly sha256: string | null;
  readonly workMs: number;
  /** Size of the output. */
  readonly bytes: number;
}

/** The result of one attempt: nothing in it is the same in another one. */
export function outputBytes(of: {
  readonly taskId: string;
  readonly nonce: string;
  readonly bytes: number;
}): Buffer {
  const head = Buffer.from(`${of.taskId} ${of.nonce}\n`);
  const block = createHash('sha512').update(head).digest();
  return Buffer.concat([head, Buffer.alloc(Math.max(0, of.bytes - head.length), block)]);
}
