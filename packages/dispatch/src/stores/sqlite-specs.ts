/**
 * What tasks were submitted with: rows of neighbours, written once, never changed, and the few read last kept in memory. Tasks
 * are mostly asked for in their order, so a row is read and parsed once for all of its tasks. Synchronous; the caller brings
 * the transaction.
 */
import { MillraceError } from '@millrace/runner';
import type { Json } from '@millrace/runner';
import { isStageReference } from '../job-spec.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import type { Spec } from './sqlite-model.ts';

/** A row is closed when it has this many tasks or characters. */
const ROW_TASKS = 64;
const ROW_CHARS = 16 * 1024;

/** Characters of rows whose tasks are kept in memory. */
const KEPT_CHARS = 1024 * 1024;

/** Neighbours, of one job. */
interface Part {
  readonly firstTask: number;
  readonly jobSeq: number;
  readonly specs: readonly Spec[];
  readonly chars: number;
}

export class Specs {
  readonly #rows: BulkInsert;
  readonly #at: Statement;
  readonly #between: Statement;
  readonly #delete: Statement;
  readonly #inputs: Statement;
  readonly #inputsBetween: Statement;
  readonly #saveInputs: Statement;
  readonly #deleteInputs: Statement;
  /** By first task, the one read first in front. */
  readonly #kept = new Map<number, Part>();
  #keptChars = 0;
  #last: Part | null = null;

  constructor(database: Database) {
    this.#rows = new BulkInsert(database, 'task_specs', ['first_task', 'job_seq', 'body']);
    this.#at = database.prepare(
      'SELECT first_task, job_seq, body FROM task_specs WHERE first_task <= ? ORDER BY first_task DESC LIMIT 1',
    );
    this.#between = database.prepare(
      'SELECT first_task, job_seq, body FROM task_specs WHERE first_task BETWEEN ? AND ? ORDER BY first_task',
    );
    this.#delete = database.prepare('DELETE FROM task_specs WHERE first_task BETWEEN ? AND ?');
    this.#inputs = database.prepare('SELECT inputs FROM task_inputs WHERE task_seq = ?');
    this.#inputsBetween = database.prepare(
      'SELECT task_seq, inputs FROM task_inputs WHERE task_seq BETWEEN ? AND ?',
    );
    this.#saveInputs = database.prepare('INSERT INTO task_inputs (task_seq, inputs) VALUES (?, ?)');
    this.#deleteInputs = database.prepare('DELETE FROM task_inputs WHERE task_seq BETWEEN ? AND ?');
  }

  /** Adds the tasks of a job, which are the newest. */
  add(jobSeq: number, firstTask: number, specs: readonly Spec[]): void {
    let [from, chars] = [0, 0];
    let texts: string[] = [];
    for (const [index, spec] of specs.entries()) {
      const text = textOf(spec);
      texts.push(text);
      chars += text.length;
      if (texts.length < ROW_TASKS && chars < ROW_CHARS && index < specs.length - 1) continue;
      this.#rows.add(firstTask + from, jobSeq, `[${texts.join(',')}]`);
      this.#keep({ firstTask: firstTask + from, jobSeq, specs: specs.slice(from, index + 1), chars });
      [from, chars] = [index + 1, 0];
      texts = [];
    }
  }

  /** Writes what was added. */
  flush(): void {
    this.#rows.flush();
  }

  clear(): void {
    this.#rows.clear();
    this.#kept.clear();
    this.#keptChars = 0;
    this.#last = null;
  }

  /** Of one task, with the inputs as submitted. */
  get(seq: number): { readonly jobSeq: number; readonly spec: Spec } {
    const part = this.#part(seq);
    const spec = part.specs[seq - part.firstTask];
    if (!spec) throw new MillraceError('internal', `task number ${seq} does not exist`);
    return { jobSeq: part.jobSeq, spec };
  }

  /** Of one task, with the inputs as they are now. */
  getResolved(seq: number): Spec {
    const { spec } = this.get(seq);
    if (!hasReferences(spec)) return spec;
    const row = this.#inputs.get(seq);
    return row ? { ...spec, inputs: JSON.parse(String(row[0])) as string[] } : spec;
  }

  /** Of all tasks from one to another of the same job, with the inputs as they are now. */
  between(firstTask: number, lastTask: number): Spec[] {
    const specs: Spec[] = [];
    const first = this.#part(firstTask);
    for (const row of this.#between.all(first.firstTask, lastTask)) specs.push(...partOf(row).specs);
    const found = specs.slice(firstTask - first.firstTask, lastTask + 1 - first.firstTask);
    if (!found.some(hasReferences)) return found;
    for (const [seq, inputs] of this.#inputsBetween.all(firstTask, lastTask)) {
      const index = (seq as number) - firstTask;
      const spec = found[index];
      if (spec) found[index] = { ...spec, inputs: JSON.parse(String(inputs)) as string[] };
    }
    return found;
  }

  /** Notes what the references in a task's inputs came to. */
  resolve(seq: number, inputs: readonly string[]): void {
    this.#saveInputs.run(seq, JSON.stringify(inputs));
  }

  /** Removes the tasks of a job. */
  delete(firstTask: number, lastTask: number): void {
    this.#delete.run(firstTask, lastTask);
    this.#deleteInputs.run(firstTask, lastTask);
    for (let seq = firstTask; seq <= lastTask;) {
      const part = this.#kept.get(seq);
      if (part) this.#drop(part);
      seq += part?.specs.length ?? 1;
    }
  }

  #part(seq: number): Part {
    const last = this.#last;
    if (last && seq >= last.firstTask && seq < last.firstTask + last.specs.length) return last;
    let part = this.#kept.get(seq);
    if (!part) {
      const row = this.#at.get(seq);
      if (!row) throw new MillraceError('internal', `task number ${seq} does not exist`);
      part = this.#kept.get(row[0] as number) ?? this.#keep(partOf(row));
    }
    this.#last = part;
    return part;
  }

  #keep(part: Part): Part {
    this.#kept.set(part.firstTask, part);
    this.#keptChars += part.chars;
    for (const oldest of this.#kept.values()) {
      if (this.#keptChars <= KEPT_CHARS || oldest === part) break;
      this.#drop(oldest);
    }
    return part;
  }

  #drop(part: Part): void {
    this.#kept.delete(part.firstTask);
    this.#keptChars -= part.chars;
    if (this.#last === part) this.#last = null;
  }
}

function hasReferences({ inputs }: Spec): boolean {
  return inputs.some(isStageReference);
}

function textOf(spec: Spec): string {
  return JSON.stringify([
    spec.stage,
    spec.queueId,
    spec.priority,
    spec.maxAttempts,
    spec.deadlineAt,
    spec.label,
    spec.stageName === spec.label ? null : spec.stageName,
    spec.inputs,
    spec.outputsPrefix,
    spec.meta,
    // Left out from the end, since few tasks have them.
    ...(spec.concurrency !== null
      ? [spec.notBefore, [spec.concurrency.key, spec.concurrency.limit]]
      : spec.notBefore !== null
        ? [spec.notBefore]
        : []),
  ]);
}

type StoredSpec = readonly [
  stage: number,
  queueId: number,
  priority: number,
  maxAttempts: number,
  deadlineAt: number | null,
  label: string,
  stageName: string | null,
  inputs: string[],
  outputsPrefix: string | null,
  meta: Json,
  notBefore?: number | null,
  concurrency?: readonly [key: string, limit: number],
];

function partOf([firstTask, jobSeq, body]: Row): Part {
  const text = String(body);
  const specs = (JSON.parse(text) as StoredSpec[]).map(
    ([
      stage,
      queueId,
      priority,
      maxAttempts,
      deadlineAt,
      label,
      stageName,
      inputs,
      outputsPrefix,
      meta,
      notBefore = null,
      concurrency,
    ]): Spec => ({
      stage,
      queueId,
      priority,
      maxAttempts,
      deadlineAt,
      notBefore,
      concurrency: concurrency === undefined ? null : { key: concurrency[0], limit: concurrency[1] },
      label,
      stageName: stageName ?? label,
      inputs,
      outputsPrefix,
      meta,
    }),
  );
  return { firstTask: firstTask as number, jobSeq: jobSeq as number, specs, chars: text.length };
}
