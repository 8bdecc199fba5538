/**
 * Ids. UUIDs of version 7 (RFC 9562) from an injected clock and random source: ordered by time of making, so that new rows go
 * to the end of their index, and strictly increasing within one generator even when the clock stands still or jumps back.
 *
 * Ids that are many are not kept but made again when they are shown: a task's from its job's, a lease's from when it was
 * given and its number. They have the form of the others.
 */
import type { Clock, Random } from '@millrace/runner';

const HEX = Array.from({ length: 0x10000 }, (_, value) => value.toString(16).padStart(4, '0'));

/** A function that makes one id per call, hyphenated lower case. */
export function uuidV7(clock: Clock, random: Random): () => string {
  let lastMs = 0;
  let counter = 0;
  let prefix = '';
  const tail = (): string => {
    const [a, b] = [Math.floor(random() * 2 ** 30), Math.floor(random() * 2 ** 32)];
    return `-${HEX[0x8000 + (a >>> 16)]}-${HEX[a & 0xffff]}${HEX[b >>> 16]}${HEX[b & 0xffff]}`;
  };
  return () => {
    const now = clock.now();
    if (now > lastMs) {
      lastMs = now;
      // Half of the counter's 12 bits stay free, so that a burst within one millisecond finds room.
      counter = Math.floor(random() * 0x800);
    } else if (counter < 0xfff) {
      counter += 1;
      return `${prefix}${HEX[0x7000 + counter]}${tail()}`;
    } else {
      // The counter is used up: borrow from the future, as the RFC allows.
      lastMs += 1;
      counter = 0;
    }
    prefix = timePart(lastMs);
    return `${prefix}${HEX[0x7000 + counter]}${tail()}`;
  };
}

/** The first 48 bits, with the hyphens around the last 16 of them. */
function timePart(ms: number): string {
  const high = Math.floor(ms / 0x10000);
  return `${HEX[Math.floor(high / 0x10000)]}${HEX[high % 0x10000]}-${HEX[ms % 0x10000]}-`;
}

/**
 * A job's id as its tasks' ids are made from it: the first 96 bits, which no other job of the store has, since time and
 * counter are in them, and the last 32, from which the tasks count on.
 */
export interface TaskIds {
  readonly prefix: string;
  readonly last: number;
}

/** Characters of {@link TaskIds.prefix}. */
const PREFIX = 28;

export function taskIdsOf(jobId: string): TaskIds {
  return { prefix: prefixOf(jobId), last: Number.parseInt(jobId.slice(PREFIX), 16) };
}

/** What the ids of a job and of its tasks have in common. */
export function prefixOf(id: string): string {
  return id.slice(0, PREFIX);
}

/** The id of the task with this place in its job, from 0. */
export function taskId({ prefix, last }: TaskIds, index: number): string {
  const low = (last + 1 + index) >>> 0;
  return `${prefix}${HEX[low >>> 16]}${HEX[low & 0xffff]}`;
}

/** The place in the job, from 0, of the task with this id; past every job's last for an id that is no task's. */
export function taskIndex({ last }: TaskIds, id: string): number {
  const low = Number.parseInt(id.slice(PREFIX), 16);
  return Number.isNaN(low) ? Infinity : (low - 1 - last) >>> 0;
}

/** Lease numbers are below this. */
export const LEASE_NUMBERS = 2 ** 48;

let leaseMs = -1;
let leasePrefix = '';

/** The id of the lease given at this time under this number. */
export function leaseId(atMs: number, no: number): string {
  if (atMs !== leaseMs) {
    leaseMs = atMs;
    leasePrefix = `${timePart(atMs)}7000-8000-`;
  }
  const low = no % 2 ** 32;
  return `${leasePrefix}${HEX[Math.floor(no / 2 ** 32)]}${HEX[low >>> 16]}${HEX[low & 0xffff]}`;
}
