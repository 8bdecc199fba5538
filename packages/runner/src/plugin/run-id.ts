/** Names of runs, for people: who runs it, in which lane, and the how-manieth of this process it is. */
import type { Slot } from '../model/identity.ts';

export interface RunId {
  /** `{runner}-{slot}-{seq}`, decimal. Both parts may contain `-`: not to be taken apart; the parts are kept beside it. */
  readonly name: string;
  readonly runner: string;
  readonly slot: Slot;
  /** Counts from 1, for all runners and slots of the process together. A restart begins again. */
  readonly seq: number;
}

let lastSeq = 0;

/** The next run id. The number is used up even if what is built under it fails. */
export function makeRunId(runner: string, slot: Slot): RunId {
  lastSeq += 1;
  return { name: `${runner}-${slot}-${lastSeq}`, runner, slot, seq: lastSeq };
}
