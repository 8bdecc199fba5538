/**
 * When a task need not be done again: the same code was given the same inputs and parameters before, and both times its
 * requestor says that nothing else decides the result. Stores ask here what two tasks have to agree in, and keep and
 * find the answers in their transactions.
 *
 * A task takes part when its job says `cache: true` and its `meta`
 * - names its code: `ref` (or `wasm.module`) a compute (`compute://sha256/…`), or for work of any other kind `code_digest`, a text that changes
 *   whenever the code does; and
 * - declares itself deterministic: `deterministic: true`, or for a compute a fixed `now`, since its clock is all that it
 *   could see of the world (random numbers come from a seed that is the same unless `meta` says otherwise). With
 *   `deterministic: false` it never takes part.
 *
 * Its inputs have to be data of its own domain; of anything else nobody here knows what it holds.
 *
 * Only completions are kept. A task that is completed from an earlier one has data items of its own, over the same bytes.
 */
import { createHash } from 'node:crypto';
import type { Json, JsonObject } from '@millrace/runner';
import { digestOfRef } from './compute-refs.ts';
import type { CapabilityFilters, NodeMode } from './records.ts';

/** What decides the result of a task. */
export interface MemoWork {
  /** Results do not pass from one domain to another. */
  readonly domainId: string;
  readonly capability: string;
  /** Who may do the work; a result of others would not have been accepted. */
  readonly mode: NodeMode;
  readonly filters: CapabilityFilters;
  /** The parameters. */
  readonly meta: Json;
  /** `sha256:<hex>` of each input, in their order. */
  readonly inputs: readonly string[];
}

/** A text that changes whenever the code of a task does; null when the task does not take part. */
export function memoCode(meta: Json): string | null {
  if (!isObject(meta)) return null;
  const { code_digest: declared, deterministic } = meta;
  // A compute is named in `meta` itself, or in the form of the kind "wasm" below it.
  const { wasm } = meta;
  const [ref, now] = isObject(wasm) ? [wasm['module'], wasm['now']] : [meta['ref'], meta['now']];
  const compute = typeof ref === 'string' ? digestOfRef(ref) : null;
  const code = compute ?? (typeof declared === 'string' && declared !== '' ? declared : null);
  const fixed = compute !== null && now !== undefined && now !== null;
  return deterministic === true || (deterministic !== false && fixed) ? code : null;
}

function isObject(value: Json | undefined): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** SHA-256, in hex, over everything two tasks must agree in to have one result. */
export function memoKey(code: string, work: MemoWork): string {
  const { domainId, capability, mode, filters, meta, inputs } = work;
  // The version is for a day when another member has to be added: old keys then match nothing.
  const text = canonicalJson({ v: 1, domainId, capability, mode, filters, code, inputs, meta });
  return createHash('sha256').update(text).digest('hex');
}

/** JSON in one way only: members in the order of their names, no spaces. */
function canonicalJson(value: unknown): string {
  if (typeof value !== 'object' || value === null) return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(',')}]`;
  const members = Object.keys(value)
    .toSorted()
    .map((key) => `${JSON.stringify(key)}:${canonicalJson((value as JsonObject)[key])}`);
  return `{${members.join(',')}}`;
}

/** An artifact as a completion reported it. */
export interface ReportedArtifact {
  readonly logical_path: string;
  readonly name: string;
  readonly data_type: string;
  readonly id: string | null;
}

/** What a completion reported to have made; null when it does not say in the form our nodes do. */
export function reportedArtifacts(meta: Json): ReportedArtifact[] | null {
  if (typeof meta !== 'object' || meta === null || Array.isArray(meta)) return null;
  const { artifacts = [] } = meta;
  if (!Array.isArray(artifacts)) return null;
  const found: ReportedArtifact[] = [];
  for (const one of artifacts) {
    if (typeof one !== 'object' || one === null || Array.isArray(one)) return null;
    const { logical_path, name, data_type, id = null } = one;
    if (typeof logical_path !== 'string' || typeof name !== 'string' || typeof data_type !== 'string')
      return null;
    if (typeof id !== 'string' && id !== null) return null;
    found.push({ logical_path, name, data_type, id });
  }
  return found;
}

/**
 * The `meta` of a completion that is an earlier one again: its report without what was used, with the artifacts of the
 * new task, and where it comes from.
 */
export function memoReport(
  original: Json,
  task: { readonly id: string; readonly jobId: string },
  from: { readonly taskId: string; readonly jobId: string; readonly key: string },
  artifacts: readonly ReportedArtifact[],
): JsonObject {
  const first = typeof original === 'object' && original !== null && !Array.isArray(original) ? original : {};
  // Nothing was used this time.
  const { usage: _, ...report } = first;
  const { job } = report;
  const told = typeof job === 'object' && job !== null && !Array.isArray(job) ? job : {};
  return {
    ...report,
    job: { ...told, task_id: task.id, job_id: task.jobId },
    artifacts: artifacts.map((artifact) => ({ ...artifact })),
    memo: { task_id: from.taskId, job_id: from.jobId, key: from.key },
  };
}

/**
 * What the new task's copy of an artifact is called: its path under the new task's prefix, and the name, which ends with the
 * old task's id, with the new one's in its place.
 */
export function memoTarget(
  artifact: Pick<ReportedArtifact, 'logical_path' | 'name'>,
  from: { readonly taskId: string; readonly prefix: string | null },
  to: { readonly taskId: string; readonly prefix: string | null },
): { readonly logicalPath: string; readonly name: string } {
  const [before, after] = [trimSlashes(from.prefix), trimSlashes(to.prefix)];
  const path = artifact.logical_path;
  const rest = before !== '' && path.startsWith(`${before}/`) ? path.slice(before.length + 1) : path;
  const logicalPath = after === '' ? rest : `${after}/${rest}`;
  // Ids are of one length, so a name that was short enough stays so.
  const stem = artifact.name.slice(0, -from.taskId.length);
  return { logicalPath, name: `${stem}${to.taskId}` };
}

function trimSlashes(prefix: string | null): string {
  return (prefix ?? '').replaceAll(/^\/+|\/+$/g, '');
}
