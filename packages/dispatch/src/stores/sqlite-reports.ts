/** What heartbeats brought: the newest progress and the last few events of each task, shown in its `meta`. */
import type { Json } from '@millrace/runner';
import type { HeartbeatItem } from '../store.ts';
import type { Database, Statement } from './sqlite-database.ts';
import type { Ledger } from './sqlite-ledger.ts';
import type { Job, Report, Task } from './sqlite-model.ts';

/** Events kept for a task's `meta.events`, and the bytes of JSON they may have together. */
const KEPT_EVENTS = 20;
const KEPT_EVENT_BYTES = 64 * 1024;

/** As stored: JSON. */
interface StoredReport {
  readonly progress: string;
  readonly events: string;
}

export class Reports {
  readonly #ledger: Ledger;
  readonly #one: Statement;
  readonly #between: Statement;
  readonly #save: Statement;

  constructor(database: Database, ledger: Ledger) {
    this.#ledger = ledger;
    this.#one = database.prepare('SELECT progress, events FROM task_reports WHERE task_seq = ?');
    this.#between = database.prepare(
      'SELECT task_seq, progress, events FROM task_reports WHERE task_seq BETWEEN ? AND ?',
    );
    this.#save = database.prepare(`
      INSERT INTO task_reports (task_seq, progress, events) VALUES (?, ?, ?)
      ON CONFLICT DO UPDATE SET progress = excluded.progress, events = excluded.events`);
  }

  /** Appends what a heartbeat brought to the event stream and keeps the newest. */
  take(task: Task, job: Job, { progress, events, logged }: HeartbeatItem): void {
    if (progress === null && events.length === 0) return;
    const report = (task.report ??= this.#read(task.seq));
    const text = progress === null ? report.progress : JSON.stringify(progress);
    const changed = text !== report.progress;
    if (!changed && events.length === 0) return;
    if (changed) this.#ledger.emit(job, 'task.progress', task.seq, `{"progress":${text}}`);
    report.progress = text;
    for (const event of events) {
      const line = JSON.stringify(event);
      this.#ledger.emit(job, 'task.log', task.seq, `{"event":${line}${logged ? ',"logged":true' : ''}}`);
      report.events.push(line);
    }
    let bytes = report.events.reduce((sum, line) => sum + line.length, 0);
    while (report.events.length > KEPT_EVENTS || (report.events.length > 1 && bytes > KEPT_EVENT_BYTES)) {
      bytes -= report.events.shift()?.length ?? 0;
    }
    this.#save.run(task.seq, text, `[${report.events.join(',')}]`);
  }

  of(taskSeq: number): StoredReport | undefined {
    const row = this.#one.get(taskSeq);
    return row && { progress: String(row[0]), events: String(row[1]) };
  }

  /** By number of the task. */
  ofJob({ firstTask, taskCount }: Job): Map<number, StoredReport> {
    const rows = this.#between.all(firstTask, firstTask + taskCount - 1);
    return new Map(
      rows.map(([seq, progress, events]) => [
        seq as number,
        { progress: String(progress), events: String(events) },
      ]),
    );
  }

  #read(taskSeq: number): Report {
    const stored = this.of(taskSeq);
    if (!stored) return { progress: 'null', events: [] };
    const events = JSON.parse(stored.events) as Json[];
    return { progress: stored.progress, events: events.map((event) => JSON.stringify(event)) };
  }
}
