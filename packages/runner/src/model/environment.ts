/**
 * Environment variables of a task and of whoever runs it.
 *
 * Where both name a variable **the operator wins**: they must be able to pin `PATH` or a credential, whatever is submitted.
 */
import { arrayOf, members, string } from '../decode.ts';
import type { JsonObject } from '../json.ts';

export interface KeyValue {
  readonly key: string;
  readonly value: string;
}

/** What a task brings along, in order. A key may be there twice: its last entry counts. */
export type TaskEnv = readonly KeyValue[];

/** What the operator sets. Same shape, other side. */
export type RunnerEnv = readonly KeyValue[];

/** The value of the last entry for `key`; undefined when there is none. */
export function lookupEnv(env: TaskEnv | RunnerEnv, key: string): string | undefined {
  return env.findLast((entry) => entry.key === key)?.value;
}

/** All variables of both, sorted by key; on equal keys the operator's, and within a side the last one. */
export function mergeEnv(task: TaskEnv, operator: RunnerEnv): Readonly<Record<string, string>> {
  const merged = new Map([...task, ...operator].map(({ key, value }) => [key, value]));
  return Object.fromEntries([...merged].toSorted(([a], [b]) => (a < b ? -1 : 1)));
}

export const parseEnv: (value: unknown, path: string) => KeyValue[] = arrayOf((entry, path) =>
  members<KeyValue>({ key: string, value: string }, entry, path),
);

export function envToJson(env: TaskEnv | RunnerEnv): JsonObject[] {
  return env.map(({ key, value }) => ({ key, value }));
}
