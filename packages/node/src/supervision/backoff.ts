/** How long to wait before a task is tried again. */
import type { Random } from '@millrace/runner';
import type { BackoffPolicy } from '@millrace/runner/model';

/** A pause that is not meant to be none is at least this long. */
const SAFETY_FLOOR_MS = 1;

/** Of the pause after failure `retry`, counted from 0, before any chance: grows by the factor up to the longest. */
export function backoffBaseMs({ firstMs, maxMs, factor }: BackoffPolicy, retry: number): number {
  const base = firstMs * factor ** retry;
  return Number.isFinite(base) ? Math.min(base, maxMs) : maxMs;
}

/**
 * The pause after failure `retry`, counted from 0.
 *
 *     none            base
 *     full            0 to base
 *     equal           base/2 to base
 *     decorrelated    first to the smaller of 3·base and the longest pause
 *
 * Chance never feeds back into later pauses. Afterwards `floorMs` holds, as far as the longest pause is longer.
 */
export function backoffDelayMs(policy: BackoffPolicy, retry: number, random: Random, floorMs = 0): number {
  const base = backoffBaseMs(policy, retry);
  const floor = Math.min(Math.max(floorMs, SAFETY_FLOOR_MS), policy.maxMs);
  return Math.max(jittered(policy, base, random), floor);
}

function jittered({ jitter, firstMs, maxMs }: BackoffPolicy, base: number, random: Random): number {
  if (jitter === 'none') return base;
  if (jitter === 'full') return base * random();
  if (jitter === 'equal') return base / 2 + (base / 2) * random();
  const top = Math.min(3 * base, maxMs);
  return top <= firstMs ? firstMs : firstMs + (top - firstMs) * random();
}
