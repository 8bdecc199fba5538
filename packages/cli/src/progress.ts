/**
 * A job as its events tell it, and that as lines. Both are pure: events and a time in, text out. Drawing is
 * `progress-display.ts`.
 *
 * What a runner reports as progress is any JSON. Understood are a number (up to 1 a fraction, above a percentage) and
 * objects with `pct` or `percent`, `fraction`, `progress`, or `done` and `total` (with `unit`, such as `bytes`), beside
 * `stage` or `phase` and `message`; a string is a message. Anything else is shown as no percentage.
 */
import type { JobDetail, JobEvent } from '@millrace/dispatch';
import type { Json } from '@millrace/runner';
import type { Paint } from './terminal.ts';
import { fitWidth, oneLine, padWidth, textWidth } from './text-width.ts';
import { formatBytes, formatClock, formatDuration } from './units.ts';

type TaskStatus = JobDetail['tasks'][number]['status'];
type JobStatus = JobDetail['job']['status'];

/** What a progress value says. */
export interface ProgressReading {
  /** 0 to 1; null when the value tells none. */
  readonly fraction: number | null;
  readonly message: string | null;
  readonly done: number | null;
  readonly unit: string | null;
}

export function readProgress(value: Json): ProgressReading {
  const nothing: ProgressReading = { fraction: null, message: null, done: null, unit: null };
  if (typeof value === 'number') return { ...nothing, fraction: fractionOf(value) };
  if (typeof value === 'string') return { ...nothing, message: oneLine(value) || null };
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return nothing;
  const number = (key: string): number | null => {
    const member = value[key];
    return typeof member === 'number' && Number.isFinite(member) ? member : null;
  };
  const text = (key: string): string | null => {
    const member = value[key];
    return typeof member === 'string' && member !== '' ? oneLine(member) : null;
  };
  const percent = number('pct') ?? number('percent');
  const done = number('done');
  const total = number('total');
  const fraction =
    percent !== null
      ? clamp(percent / 100)
      : (fractionOf(number('fraction') ?? number('progress')) ??
        (done !== null && total !== null && total > 0 ? clamp(done / total) : null));
  const message = [text('stage') ?? text('phase'), text('message')]
    .filter((part) => part !== null)
    .join(': ');
  return { fraction, message: message || null, done, unit: text('unit') };
}

function fractionOf(value: number | null): number | null {
  if (value === null || !Number.isFinite(value)) return null;
  return clamp(value <= 1 ? value : value / 100);
}

function clamp(value: number): number {
  return Math.min(1, Math.max(0, value));
}

interface TaskView {
  readonly id: string;
  readonly name: string;
  readonly capability: string;
  status: TaskStatus;
  depsRemaining: number;
  attempt: number;
  startedAtMs: number | null;
  endedAtMs: number | null;
  progress: ProgressReading;
  /** Units of `done` per second, smoothed. */
  rate: number | null;
  lastDone: { readonly value: number; readonly atMs: number } | null;
  /** Why it failed, or why it is tried again. */
  reason: string | null;
}

const NO_PROGRESS = readProgress(null);
/** With work to do and nobody doing any for this long, the lines say where to look. */
const STARVED_MS = 5_000;

/** The state of a job, kept current by {@link apply}. */
export class JobView {
  readonly id: string;
  readonly label: string;
  status: JobStatus;
  cancelRequested: boolean;
  readonly #startedAtMs: number;
  #endedAtMs: number | null = null;
  /** Since when nobody has been working although something could be; null while somebody is. */
  #idleSinceMs: number | null;
  readonly tasks: readonly TaskView[];
  readonly #byId: ReadonlyMap<string, TaskView>;

  /** From the job's first description; events from sequence number 1 on are then applied. */
  constructor(detail: JobDetail) {
    this.id = detail.job.id;
    this.label = oneLine(detail.job.label) || 'job';
    this.status = 'pending';
    this.cancelRequested = false;
    this.#startedAtMs = Date.parse(detail.job.created_at);
    this.#idleSinceMs = this.#startedAtMs;
    // As if no event had happened: the events tell the rest, from the beginning.
    this.tasks = detail.tasks.map((task) => ({
      id: task.id,
      name: taskName(task),
      capability: task.capability,
      status: 'queued',
      depsRemaining: 0,
      attempt: 0,
      startedAtMs: null,
      endedAtMs: null,
      progress: NO_PROGRESS,
      rate: null,
      lastDone: null,
      reason: null,
    }));
    this.#byId = new Map(this.tasks.map((task) => [task.id, task]));
    const waiting = new Set(detail.job.edges.map((edge) => edge.to));
    for (const [index, task] of detail.tasks.entries()) {
      const view = this.tasks[index];
      if (view !== undefined && waiting.has(task.stage)) view.depsRemaining = 1;
    }
  }

  /** Takes one event in. Returns a line worth telling even where nothing is redrawn, or null. */
  apply(event: JobEvent): string | null {
    const atMs = Date.parse(event.at);
    if (event.task_id === null) return this.#applyToJob(event, atMs);
    const task = this.#byId.get(event.task_id);
    return task === undefined ? null : this.#applyToTask(task, event, atMs);
  }

  #applyToJob(event: JobEvent, atMs: number): string | null {
    switch (event.kind) {
      case 'job.running':
        this.status = 'running';
        return null;
      case 'job.cancel_requested':
        this.cancelRequested = true;
        return 'cancel requested';
      case 'job.completed':
      case 'job.failed':
      case 'job.canceled':
        this.status = event.kind.slice('job.'.length) as JobStatus;
        this.#endedAtMs = atMs;
        return null;
      default:
        return null;
    }
  }

  #applyToTask(task: TaskView, event: JobEvent, atMs: number): string | null {
    const reason = typeof event.data['reason'] === 'string' ? oneLine(event.data['reason']) : null;
    const end = (status: TaskStatus): void => {
      task.status = status;
      task.endedAtMs = atMs;
      task.rate = null;
      if (reason !== null) task.reason = reason;
      this.#noteActivity(atMs);
    };
    const requeue = (why: string | null): void => {
      task.status = 'queued';
      task.startedAtMs = null;
      task.progress = NO_PROGRESS;
      task.rate = null;
      task.lastDone = null;
      task.reason = why;
      this.#noteActivity(atMs);
    };
    switch (event.kind) {
      case 'task.runnable':
        task.depsRemaining = 0;
        this.#noteActivity(atMs);
        return null;
      case 'task.leased':
        task.status = 'leased';
        task.startedAtMs = atMs;
        task.attempt = typeof event.data['attempt'] === 'number' ? event.data['attempt'] : task.attempt + 1;
        this.#noteActivity(atMs);
        return null;
      case 'task.running':
        task.status = 'running';
        return null;
      case 'task.progress':
        this.#progress(task, event.data['progress'] ?? null, atMs);
        return null;
      case 'task.retry':
        requeue(reason);
        return `${task.name}: attempt ${task.attempt} failed, will be tried again: ${reason ?? 'no reason given'}`;
      case 'task.released':
        requeue(reason);
        return `${task.name}: given back by its node${reason === null ? '' : ` (${reason})`}`;
      case 'task.expired':
        requeue('its node stopped answering');
        return `${task.name}: its node stopped answering, will be tried again`;
      case 'task.resumed':
        task.status = 'running';
        task.startedAtMs = atMs;
        task.reason = null;
        this.#noteActivity(atMs);
        return `${task.name}: its node is back and goes on`;
      case 'task.completed':
        end('completed');
        return null;
      case 'task.failed':
        end('failed');
        return `${task.name}: failed: ${task.reason ?? 'no reason given'}`;
      case 'task.canceled':
        end('canceled');
        return null;
      default:
        return null;
    }
  }

  #progress(task: TaskView, value: Json, atMs: number): void {
    task.progress = readProgress(value);
    const { done } = task.progress;
    if (done === null) return;
    const before = task.lastDone;
    if (before !== null && atMs > before.atMs && done >= before.value) {
      const now = ((done - before.value) * 1000) / (atMs - before.atMs);
      task.rate = task.rate === null ? now : task.rate * 0.7 + now * 0.3;
    }
    task.lastDone = { value: done, atMs };
  }

  #noteActivity(atMs: number): void {
    const active = this.tasks.some((task) => task.status === 'leased' || task.status === 'running');
    const runnable = this.tasks.some((task) => task.status === 'queued' && task.depsRemaining === 0);
    if (active || !runnable) this.#idleSinceMs = null;
    else this.#idleSinceMs ??= atMs;
  }

  get finished(): boolean {
    return this.status === 'completed' || this.status === 'failed' || this.status === 'canceled';
  }

  count(...statuses: readonly TaskStatus[]): number {
    return this.tasks.filter((task) => statuses.includes(task.status)).length;
  }

  elapsedMs(nowMs: number): number {
    return Math.max(0, (this.#endedAtMs ?? nowMs) - this.#startedAtMs);
  }

  /** What to look at when nobody takes the work; null while all is well. */
  hint(nowMs: number): string | null {
    if (this.finished || this.#idleSinceMs === null || nowMs - this.#idleSinceMs < STARVED_MS) return null;
    const next = this.tasks.find((task) => task.status === 'queued' && task.depsRemaining === 0);
    // A retry that waits for its time is not starved.
    if (next === undefined || next.reason !== null) return null;
    return `no node has taken ${next.name} yet (${next.capability}); "millrace nodes" shows who could`;
  }
}

/** `stage` or `stage/label`, on one line. */
export function taskName(task: { readonly stage: string; readonly label: string }): string {
  const stage = oneLine(task.stage);
  const label = oneLine(task.label);
  if (label === '' || label === stage) return stage || 'task';
  return stage === '' ? label : `${stage}/${label}`;
}

const SPINNER = '⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏';
const BAR_WIDTH = 16;
const ICONS: Readonly<Record<TaskStatus, string>> = {
  queued: '·',
  leased: '›',
  running: '›',
  completed: '✓',
  failed: '✗',
  canceled: '–',
};

export interface LiveOptions {
  readonly nowMs: number;
  /** Columns; no line is wider. */
  readonly width: number;
  /** Lines at most, at least 2. */
  readonly height: number;
  readonly paint: Paint;
}

/** The job as lines to be drawn over: a heading, then a line per task, the ones under way first when not all fit. */
export function renderLive(view: JobView, { nowMs, width, height, paint }: LiveOptions): string[] {
  const lines = [heading(view, nowMs, width, paint)];
  const hint = view.hint(nowMs);
  const room = Math.max(1, height - 1 - (hint === null ? 0 : 1));
  const shown = choose(view.tasks, room);
  const nameWidth = Math.min(
    Math.max(8, Math.floor(width * 0.35)),
    Math.max(0, ...shown.map((task) => textWidth(task.name))),
  );
  for (const task of shown) lines.push(taskLine(task, nameWidth, nowMs, width, paint));
  const hidden = view.tasks.length - shown.length;
  if (hidden > 0) {
    const rest = view.tasks.filter((task) => !shown.includes(task));
    const parts = (['running', 'queued', 'completed', 'failed', 'canceled'] as const)
      .map((status) => [status, rest.filter((task) => task.status === status).length] as const)
      .filter(([, count]) => count > 0)
      .map(([status, count]) => `${count} ${status}`);
    lines.push(paint.dim(fitWidth(`  … and ${parts.join(', ')}`, width)));
  }
  if (hint !== null) lines.push(paint.yellow(fitWidth(`  ${hint}`, width)));
  return lines;
}

function heading(view: JobView, nowMs: number, width: number, paint: Paint): string {
  const done = view.count('completed');
  const failed = view.count('failed');
  const state = view.finished ? view.status : view.cancelRequested ? 'canceling' : null;
  const facts = [
    `${done}/${view.tasks.length} ${view.tasks.length === 1 ? 'task' : 'tasks'}`,
    ...(failed > 0 ? [`${failed} failed`] : []),
    ...(state === null ? [] : [state]),
    formatClock(view.elapsedMs(nowMs)),
  ].join('  ');
  const icon = view.finished
    ? { completed: paint.green('✓'), failed: paint.red('✗'), canceled: paint.yellow('–') }[
        view.status as 'completed' | 'failed' | 'canceled'
      ]
    : paint.cyan(SPINNER[Math.floor(nowMs / 100) % SPINNER.length] ?? ' ');
  const room = width - 2;
  const label = fitWidth(view.label, Math.max(1, room - textWidth(facts) - 2));
  return `${icon} ${paint.bold(label)}  ${fitWidth(facts, Math.max(0, room - textWidth(label) - 2))}`.trimEnd();
}

/** All tasks in order when they fit; else those that tell most: under way, failed, then the next to come. */
function choose(tasks: readonly TaskView[], room: number): readonly TaskView[] {
  if (tasks.length <= room) return tasks;
  const order: readonly TaskStatus[] = ['running', 'leased', 'failed', 'queued', 'completed', 'canceled'];
  const ranked = tasks.toSorted((a, b) => order.indexOf(a.status) - order.indexOf(b.status));
  // One line is for those left out.
  const chosen = new Set(
    ranked.slice(0, Math.max(0, room - 1)).filter((task) => order.indexOf(task.status) < 3),
  );
  return tasks.filter((task) => chosen.has(task));
}

function taskLine(task: TaskView, nameWidth: number, nowMs: number, width: number, paint: Paint): string {
  const icon = ICONS[task.status];
  const name = padWidth(fitWidth(task.name, nameWidth), nameWidth);
  const lead = 2 + 2 + nameWidth + 2;
  const [bar, text] = taskState(task, nowMs);
  const rest = fitWidth(text, Math.max(0, width - lead - (bar === '' ? 0 : BAR_WIDTH + 2)));
  const color =
    task.status === 'completed'
      ? paint.green
      : task.status === 'failed'
        ? paint.red
        : task.status === 'canceled'
          ? paint.yellow
          : task.status === 'queued'
            ? paint.dim
            : paint.cyan;
  const dimmed = task.status === 'queued' || task.status === 'completed' ? paint.dim(rest) : rest;
  if (lead >= width) return fitWidth(`  ${icon} ${task.name}`, width);
  return `  ${color(icon)} ${name}  ${bar === '' || width - lead < BAR_WIDTH + 2 ? '' : `${paint.cyan(bar)}  `}${dimmed}`.trimEnd();
}

/** The bar (empty for none) and the words beside it. */
function taskState(task: TaskView, nowMs: number): readonly [bar: string, text: string] {
  switch (task.status) {
    case 'queued': {
      if (task.depsRemaining > 0) return ['', 'waits for earlier stages'];
      return ['', task.reason === null ? 'waits for a node' : `will be tried again: ${task.reason}`];
    }
    case 'leased':
    case 'running': {
      const { fraction, message, done, unit } = task.progress;
      const facts = [
        ...(fraction === null ? [] : [`${String(Math.floor(fraction * 100)).padStart(3)}%`]),
        ...(task.rate === null ? [] : [formatRate(task.rate, unit)]),
        ...(fraction === null && done !== null ? [formatAmount(done, unit)] : []),
        ...(task.startedAtMs === null ? [] : [formatClock(nowMs - task.startedAtMs)]),
        ...(task.attempt > 1 ? [`attempt ${task.attempt}`] : []),
        ...(message === null ? [] : [message]),
      ];
      return [fraction === null ? '' : barOf(fraction), facts.join('  ')];
    }
    case 'completed':
    case 'failed':
    case 'canceled':
      break;
  }
  const took =
    task.startedAtMs === null || task.endedAtMs === null
      ? []
      : [formatDuration(task.endedAtMs - task.startedAtMs)];
  const reason = task.status === 'completed' || task.reason === null ? [] : [task.reason];
  return ['', [...took, ...reason].join('  ')];
}

function barOf(fraction: number): string {
  const filled = Math.round(fraction * BAR_WIDTH);
  return '█'.repeat(filled) + '░'.repeat(BAR_WIDTH - filled);
}

function formatAmount(value: number, unit: string | null): string {
  if (unit === 'bytes' || unit === 'B') return formatBytes(value);
  const text = value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
  return unit === null ? text : `${text} ${unit}`;
}

function formatRate(perSecond: number, unit: string | null): string {
  return `${formatAmount(perSecond, unit)}/s`;
}

/** The job in one plain line, for files and pipes. */
export function renderLine(view: JobView, nowMs: number): string {
  const under = view.tasks.filter((task) => task.status === 'leased' || task.status === 'running');
  const failed = view.count('failed');
  const running = under.slice(0, 3).map((task) => {
    const { fraction, message } = task.progress;
    const facts = [
      ...(fraction === null ? [] : [`${Math.floor(fraction * 100)}%`]),
      ...(task.rate === null ? [] : [formatRate(task.rate, task.progress.unit)]),
      ...(message === null ? [] : [message]),
    ];
    return facts.length === 0 ? task.name : `${task.name} ${facts.join(' ')}`;
  });
  if (under.length > 3) running.push(`${under.length - 3} more`);
  const parts = [
    `${view.count('completed')}/${view.tasks.length} tasks done`,
    ...(failed > 0 ? [`${failed} failed`] : []),
    ...(view.finished ? [view.status] : running.length > 0 ? [`running ${running.join(', ')}`] : ['waiting']),
  ];
  const hint = view.hint(nowMs);
  return `[${formatClock(view.elapsedMs(nowMs))}] ${view.label}: ${parts.join('; ')}${hint === null ? '' : `; ${hint}`}`;
}
