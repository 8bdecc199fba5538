/** What attempts used, as people read it. From outside: the node that told it may be of another version, or not ours. */
import type { ReceiptRecord } from '@millrace/dispatch';
import type { Json, JsonObject } from '@millrace/runner';
import { oneLine, table, type Column } from './text-width.ts';
import type { Paint } from './terminal.ts';
import { formatBytes, formatDuration } from './units.ts';

const MAX_ROWS = 100;

/**
 * A table of the newest attempt of each task that tells what it used; nothing when none does.
 *
 * @param tasks id and name of each, in the order to show them
 */
export function usageLines(
  tasks: readonly (readonly [id: string, name: string])[],
  receipts: readonly ReceiptRecord[],
  paint: Paint,
): string[] {
  const newest = new Map<string, JsonObject>();
  for (const receipt of receipts) {
    const usage = usageOf(receipt.meta);
    if (usage !== null) newest.set(receipt.task_id, usage);
  }
  const rows = tasks.flatMap(([id, name]) => {
    const usage = newest.get(id);
    return usage === undefined ? [] : [rowOf(name, usage)];
  });
  if (rows.length === 0) return [];
  const shown = rows.slice(0, MAX_ROWS);
  // A column that nobody knows anything about says nothing.
  const columns = COLUMNS.map((column, at) => ({ column, at })).filter(({ at }) =>
    shown.some((row) => row[at] !== '-'),
  );
  return [
    '',
    ...table(
      columns.map(({ column }) => column),
      shown.map((row) => columns.map(({ at }) => row[at] ?? '-')),
      paint.dim,
    ),
    ...(rows.length > MAX_ROWS ? [`  … and ${rows.length - MAX_ROWS} more; --json has them all`] : []),
  ];
}

const COLUMNS: readonly Column[] = [
  { title: 'USED BY' },
  { title: 'ENDED' },
  { title: 'WALL', align: 'right' },
  { title: 'CPU', align: 'right' },
  { title: 'MEMORY', align: 'right' },
  { title: 'IN', align: 'right' },
  { title: 'OUT', align: 'right' },
  { title: 'SANDBOX' },
];

function rowOf(name: string, usage: JsonObject): string[] {
  const show = (member: string, format: (value: number) => string): string => {
    const value = usage[member];
    return typeof value === 'number' && value >= 0 ? format(value) : '-';
  };
  return [
    name,
    endingOf(usage),
    show('wall_ms', formatDuration),
    show('cpu_ms', formatDuration),
    show('peak_memory_bytes', formatBytes),
    show('bytes_in', formatBytes),
    show('bytes_out', formatBytes),
    sandboxOf(usage['sandbox']),
  ];
}

/** `completed`, `exit 3`, `signal SIGKILL`, `limit wallMs 5000`. */
function endingOf(usage: JsonObject): string {
  const { ending, exit_code: code, signal, limit, value } = usage;
  if (typeof ending !== 'string') return '-';
  const words = [ending];
  if (typeof limit === 'string' && ending !== 'exit' && ending !== 'signal') {
    words.push(limit, ...(typeof value === 'number' ? [String(value)] : []));
  } else if (ending === 'exit' && typeof code === 'number') words.push(String(code));
  else if (ending === 'signal' && typeof signal === 'string') words.push(signal);
  return oneLine(words.join(' '));
}

/** `bwrap+cgroup, without processes`. */
function sandboxOf(sandbox: Json | undefined): string {
  if (!isObject(sandbox) || !isObject(sandbox['applied'])) return '-';
  const { tier, cgroup } = sandbox['applied'];
  if (typeof tier !== 'string') return '-';
  const listed = Array.isArray(sandbox['missing']) ? sandbox['missing'] : [];
  const missing = listed.filter((control) => typeof control === 'string');
  return oneLine(
    `${tier}${cgroup === true && tier !== 'container' ? '+cgroup' : ''}${missing.length > 0 ? `, without ${missing.join(', ')}` : ''}`,
  );
}

/** Null: it tells nothing. */
function usageOf(meta: Json): JsonObject | null {
  if (!isObject(meta)) return null;
  const { usage } = meta;
  return isObject(usage) ? usage : null;
}

function isObject(value: Json | undefined): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
