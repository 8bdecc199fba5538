/**
 * `stage:` inputs: from what the tasks of an earlier stage reported to the data ids a later task gets. Pure; the store
 * brings the reports.
 */
import picomatch from 'picomatch';
import type { Json } from '@millrace/runner';

/** What one task of the earlier stage reported when it completed. Tasks come in the order of the job. */
export interface StageOutput {
  readonly outputsPrefix: string | null;
  /** `output_cids` of the accepted completion. */
  readonly outputs: readonly string[];
  /** Its `meta`. */
  readonly meta: Json;
}

interface Artifact {
  readonly id: string;
  /** null: reported by id only. Such an output is part of the stage, but no glob can match it. */
  readonly path: string | null;
  readonly relative: string | null;
}

/** The outputs of one stage, asked for by many tasks. Answers are kept, so a repeated question is free. */
export class StageOutputs {
  readonly #artifacts: readonly Artifact[];
  readonly #answers = new Map<string | null, readonly string[]>();

  constructor(tasks: readonly StageOutput[]) {
    this.#artifacts = tasks.flatMap(artifactsOf);
  }

  /**
   * Data ids in the order of the producing tasks, within one by logical path. `glob` is tried on the whole logical path
   * and on the path without the producing task's outputs prefix; null takes everything. Each id is listed once.
   */
  select(glob: string | null): readonly string[] {
    const known = this.#answers.get(glob);
    if (known) return known;
    const matches =
      // Extended globs are off: `+(a|aa)` and its like can take exponential time, and patterns come from outside.
      glob === null ? () => true : picomatch(glob, { dot: true, noextglob: true, nonegate: true });
    const ids = new Set<string>();
    for (const { id, path, relative } of this.#artifacts) {
      const hit =
        glob === null ||
        (path !== null && matches(path)) ||
        (relative !== null && relative !== path && matches(relative));
      if (hit) ids.add(id);
    }
    const answer = [...ids];
    this.#answers.set(glob, answer);
    return answer;
  }
}

/** Paths longer than this are matched by no glob: the time of a match grows with a power of the length. */
const MAX_MATCHED_PATH = 1024;

function artifactsOf(task: StageOutput): Artifact[] {
  const prefix = trimSlashes(task.outputsPrefix ?? '');
  const found = new Map<string, Artifact>();
  const meta = task.meta;
  const reported =
    typeof meta === 'object' && meta !== null && !Array.isArray(meta) && Array.isArray(meta['artifacts'])
      ? meta['artifacts']
      : [];
  for (const item of reported) {
    if (typeof item !== 'object' || item === null || Array.isArray(item)) continue;
    const { id, logical_path: path } = item;
    if (typeof id !== 'string' || id === '' || typeof path !== 'string') continue;
    const usable = path.length <= MAX_MATCHED_PATH;
    const relative = prefix !== '' && path.startsWith(`${prefix}/`) ? path.slice(prefix.length + 1) : path;
    found.set(id, { id, path: usable ? path : null, relative: usable ? relative : null });
  }
  const artifacts = [...found.values()].toSorted((a, b) => compare(a.path ?? '', b.path ?? ''));
  for (const id of task.outputs) if (!found.has(id)) artifacts.push({ id, path: null, relative: null });
  return artifacts;
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

function trimSlashes(text: string): string {
  return text.replace(/^\/+/, '').replace(/\/+$/, '');
}
