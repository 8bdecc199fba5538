/** What `many-nodes.ts` and its processes of nodes say to each other. */
import type { BenchNode } from './fixtures.ts';

export const QUICK = '/bench/many-quick/v1';
export const HOLD = '/bench/many-hold/v1';

export interface WorkerStart {
  readonly url: string;
  readonly workDir: string;
  readonly nodes: readonly BenchNode[];
}

/** Since the last report. */
export interface WorkerReport {
  readonly heartbeats: readonly {
    readonly taskId: string;
    readonly endedAtMs: number;
    readonly tookMs: number;
  }[];
  readonly failures: number;
  readonly logins: number;
  readonly connections: number;
  readonly residentMiB: number;
  readonly holding: number;
}

export type FromParent =
  { readonly kind: 'report' } | { readonly kind: 'finish' } | { readonly kind: 'stop' };

export type ToParent =
  | { readonly kind: 'ready'; readonly residentMiB: number }
  | { readonly kind: 'entered'; readonly taskId: string; readonly atMs: number }
  | { readonly kind: 'aborted'; readonly taskId: string; readonly reason: string }
  | { readonly kind: 'gave-up'; readonly error: string }
  | { readonly kind: 'report'; readonly report: WorkerReport };
