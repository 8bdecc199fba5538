/**
 * A job's events as something to look at: a board of the tiles while it runs, a timeline when it has ended. Pure: events
 * in, lines of text out.
 */
import type { JobDetail, JobEvent } from '@millrace/dispatch';

/** One try at a task, as the events told it. */
interface Attempt {
  readonly task: string;
  readonly node: string;
  readonly startMs: number;
  endMs: number | null;
  outcome: string;
}

interface TaskState {
  readonly label: string;
  readonly stage: string;
  status: 'waiting' | 'leased' | 'completed' | 'failed' | 'canceled';
  /** 0 to 1. */
  fraction: number;
  message: string;
}

/** Events that end an attempt: what to call it, and how the task stands then. */
const ENDINGS: Readonly<Record<string, { readonly outcome: string; readonly status: TaskState['status'] }>> =
  {
    'task.completed': { outcome: 'completed', status: 'completed' },
    'task.failed': { outcome: 'failed', status: 'failed' },
    'task.canceled': { outcome: 'canceled', status: 'canceled' },
    'task.retry': { outcome: 'failed, tried again', status: 'waiting' },
    'task.released': { outcome: 'given back', status: 'waiting' },
    'task.expired': { outcome: 'node lost', status: 'waiting' },
  };

/** Builds up from a job and its events, in order. */
export class JobBoard {
  readonly #tasks = new Map<string, TaskState>();
  readonly #attempts: Attempt[] = [];
  readonly #nodeNames: ReadonlyMap<string, string>;
  #firstMs: number | null = null;
  #lastMs = 0;

  /** @param nodeNames what to call each node id; an id not among them is shown as it is */
  constructor(detail: JobDetail, nodeNames: ReadonlyMap<string, string>) {
    this.#nodeNames = nodeNames;
    for (const { id, label, stage } of detail.tasks) {
      this.#tasks.set(id, { label, stage, status: 'waiting', fraction: 0, message: '' });
    }
  }

  /** Takes the next event. Returns one line about it when it is worth one, else null. */
  apply(event: JobEvent): string | null {
    const atMs = Date.parse(event.at);
    this.#firstMs ??= atMs;
    this.#lastMs = Math.max(this.#lastMs, atMs);
    const task = event.task_id === null ? undefined : this.#tasks.get(event.task_id);
    if (!task || event.task_id === null) return null;
    if (event.kind === 'task.leased') {
      const { node_id: id } = event.data;
      const node = typeof id === 'string' ? (this.#nodeNames.get(id) ?? id) : '';
      this.#attempts.push({ task: event.task_id, node, startMs: atMs, endMs: null, outcome: 'running' });
      task.status = 'leased';
      return null;
    }
    if (event.kind === 'task.progress') {
      this.#readProgress(task, event.data['progress']);
      return null;
    }
    if (event.kind === 'task.resumed') {
      // The node that was taken for lost had gone on all the time.
      const lost = this.#attempts.findLast((one) => one.task === event.task_id);
      if (lost) Object.assign(lost, { endMs: null, outcome: 'running' });
      task.status = 'leased';
      return `${task.label} goes on${lost ? ` on ${lost.node}` : ''}`;
    }
    const ending = ENDINGS[event.kind];
    if (ending === undefined) return null;
    const { outcome, status } = ending;
    const attempt = this.#attempts.findLast((one) => one.task === event.task_id && one.endMs === null);
    if (attempt) {
      attempt.endMs = atMs;
      attempt.outcome = outcome;
    }
    task.status = status;
    task.fraction = status === 'completed' ? 1 : 0;
    const reason = event.data['reason'];
    const took = attempt ? ` after ${seconds(atMs - attempt.startMs)} on ${attempt.node}` : '';
    return `${task.label} ${outcome}${took}${typeof reason === 'string' && reason ? `: ${reason}` : ''}`;
  }

  /**
   * The state of things: a line per stage that is a single task, and the stage `tile` as a map of its tiles, in rows of
   * `columns`, where a tile fills up while it is drawn.
   */
  board(columns: number): string[] {
    const lines: string[] = [];
    const tiles: string[] = [];
    for (const task of this.#tasks.values()) {
      if (task.stage === 'tile') tiles.push(cell(task));
      else lines.push(`${task.stage.padEnd(8)} ${bar(task)} ${task.message}`.trimEnd());
    }
    const rows = Array.from({ length: Math.ceil(tiles.length / columns) }, (_, row) =>
      tiles.slice(row * columns, (row + 1) * columns).join(''),
    );
    const done = [...this.#tasks.values()].filter(
      (one) => one.stage === 'tile' && one.status === 'completed',
    );
    const block = rows.map((row, index) => `${(index === 0 ? 'tile' : '').padEnd(8)} ${row}`);
    if (block[0] !== undefined) block[0] += `  ${done.length}/${tiles.length}`;
    return [...lines.slice(0, 1), ...block, ...lines.slice(1)];
  }

  /** A line per attempt: when it ran, where, for how long, and how it ended where that was not well. */
  timeline(width: number): string[] {
    const start = this.#firstMs ?? 0;
    const span = Math.max(this.#lastMs - start, 1);
    const rows = this.#attempts.map((attempt) => {
      const endMs = attempt.endMs ?? this.#lastMs;
      return {
        label: this.#tasks.get(attempt.task)?.label ?? attempt.task,
        node: attempt.node,
        at: `+${seconds(attempt.startMs - start)}`,
        took: seconds(endMs - attempt.startMs),
        from: (attempt.startMs - start) / span,
        to: (endMs - start) / span,
        note: attempt.outcome === 'completed' ? '' : ` ${attempt.outcome}`,
      };
    });
    const widest = (pick: (row: (typeof rows)[number]) => string): number =>
      rows.reduce((most, row) => Math.max(most, pick(row).length), 0);
    const [label, node, at, took] = [
      widest((row) => row.label),
      widest((row) => row.node),
      widest((row) => row.at),
      widest((row) => row.took),
    ];
    const room = Math.max(10, width - label - node - at - took - 8);
    return rows.map((row) => {
      const left = Math.min(Math.floor(row.from * room), room - 1);
      const length = Math.max(1, Math.min(Math.round((row.to - row.from) * room), room - left));
      const drawn = `${' '.repeat(left)}${'█'.repeat(length)}`.padEnd(room);
      return `${row.label.padEnd(label)}  ${row.node.padEnd(node)}  ${row.at.padStart(at)}  ${row.took.padStart(took)}  ${drawn}${row.note}`.trimEnd();
    });
  }

  #readProgress(task: TaskState, value: unknown): void {
    const { done, total, message } = (typeof value === 'object' && value !== null ? value : {}) as {
      readonly done?: unknown;
      readonly total?: unknown;
      readonly message?: unknown;
    };
    if (typeof done === 'number' && typeof total === 'number' && total > 0) {
      task.fraction = Math.min(1, Math.max(0, done / total));
    }
    task.message = typeof message === 'string' ? message : '';
  }
}

const FILLING = [' ░', '░░', '░▒', '▒▒', '▒▓', '▓▓'] as const;

const MARKS = { waiting: '··', completed: '██', failed: '!!', canceled: 'xx' } as const;

/** Two characters, which on most terminals is about a square. */
function cell({ status, fraction }: TaskState): string {
  if (status !== 'leased') return MARKS[status];
  return FILLING[Math.min(FILLING.length - 1, Math.floor(fraction * FILLING.length))]!;
}

function bar({ status, fraction }: TaskState): string {
  const filled = Math.round(fraction * 16);
  return status === 'failed' || status === 'canceled'
    ? status
    : `${'█'.repeat(filled)}${(status === 'waiting' ? '·' : '░').repeat(16 - filled)}`;
}

function seconds(ms: number): string {
  return `${(ms / 1000).toFixed(2)} s`;
}
