/** Times, durations and sizes as people write and read them. */
import { MillraceError } from '@millrace/runner';

/** `850 ms`, `4.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 4 h`. */
export function formatDuration(ms: number): string {
  const value = Math.max(0, ms);
  if (value < 1000) return `${Math.round(value)} ms`;
  if (value < 59_950) return `${(value / 1000).toFixed(value < 9950 ? 1 : 0)} s`;
  const seconds = Math.round(value / 1000);
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${two(seconds % 60)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}

/** Elapsed time in a fixed shape for a line that is redrawn: `00:07`, `12:30`, `1:02:03`. */
export function formatClock(ms: number): string {
  const seconds = Math.floor(Math.max(0, ms) / 1000);
  const hours = Math.floor(seconds / 3600);
  const rest = `${two(Math.floor((seconds % 3600) / 60))}:${two(seconds % 60)}`;
  return hours > 0 ? `${hours}:${rest}` : rest;
}

/** `999 B`, `1.5 KiB`, `12 MiB`. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  let value = bytes;
  let unit = 0;
  while (value >= 1023.95 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${units[unit] ?? 'B'}`;
}

/**
 * An RFC 3339 time in the reader's time zone, as near as is useful: `12 s ago`, `5 min ago`, `14:03` today,
 * `2026-03-02 14:03` before.
 */
export function formatTime(iso: string, nowMs: number): string {
  const at = Date.parse(iso);
  if (Number.isNaN(at)) return iso;
  const ageMs = nowMs - at;
  if (ageMs >= 0 && ageMs < 60_000) return `${Math.floor(ageMs / 1000)} s ago`;
  if (ageMs >= 0 && ageMs < 3_600_000) return `${Math.floor(ageMs / 60_000)} min ago`;
  const then = new Date(at);
  const clock = `${two(then.getHours())}:${two(then.getMinutes())}`;
  if (new Date(nowMs).toDateString() === then.toDateString()) return clock;
  return `${then.getFullYear()}-${two(then.getMonth() + 1)}-${two(then.getDate())} ${clock}`;
}

/**
 * `90`, `90s`, `1.5m`, `2h` as milliseconds; a bare number is seconds.
 *
 * @throws MillraceError `invalid_argument` for anything else, and for zero.
 */
export function parseDuration(text: string, option: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text.trim());
  const factor = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[match?.[2] ?? 's'] ?? 1000;
  const value = Number(match?.[1]) * factor;
  if (match === null || !(value > 0) || value > Number.MAX_SAFE_INTEGER) {
    throw new MillraceError(
      'invalid_argument',
      `${option} must be a duration such as 90, 90s, 15m or 2h, got ${JSON.stringify(text)}`,
    );
  }
  return value;
}

/** @throws MillraceError `invalid_argument` unless `text` is an integer between `min` and `max`. */
export function parseInteger(text: string, option: string, min: number, max: number): number {
  const value = Number(text);
  if (!/^-?\d+$/.test(text.trim()) || value < min || value > max) {
    throw new MillraceError(
      'invalid_argument',
      `${option} must be an integer from ${min} to ${max}, got ${JSON.stringify(text)}`,
    );
  }
  return value;
}

function two(value: number): string {
  return String(value).padStart(2, '0');
}
