/** When a task runs again, how long that waits, and what happens when its slot is taken. */
import { counter, number, object, string, type Decoder } from '../decode.ts';
import { MillraceError } from '../errors.ts';
import type { JsonObject } from '../json.ts';
import { invalidModel, unknownWord } from './errors.ts';

/**
 * - `never` runs once
 * - `onFailure` again after a failure or a timeout, with a backoff
 * - `always` also after a success: `intervalMs` after it ended (absent or 0: at once)
 *
 * Fatal errors and cancellation end a task whatever its policy.
 */
export type RestartPolicy =
  | { readonly type: 'never' }
  | { readonly type: 'onFailure' }
  | { readonly type: 'always'; readonly intervalMs?: number };

export const JITTER_POLICIES = ['none', 'full', 'equal', 'decorrelated'] as const;

/** How a pause is moved at random; `docs/routing.md` has the ranges. */
export type JitterPolicy = (typeof JITTER_POLICIES)[number];

export interface BackoffPolicy {
  readonly jitter: JitterPolicy;
  /** Of the first pause. */
  readonly firstMs: number;
  /** No pause is longer. */
  readonly maxMs: number;
  /** From one pause to the next. */
  readonly factor: number;
}

export const DEFAULT_BACKOFF: BackoffPolicy = { jitter: 'full', firstMs: 1_000, maxMs: 30_000, factor: 2 };

export const ADMISSION_POLICIES = ['dropIfRunning', 'replace', 'queue'] as const;

/**
 * What a task does when another one has its slot:
 *
 * - `dropIfRunning` it is refused
 * - `replace` the other is stopped, and this one is next
 * - `queue` it waits
 */
export type AdmissionPolicy = (typeof ADMISSION_POLICIES)[number];

/** Two factors are the same when their bits are. */
export function sameBackoff(a: BackoffPolicy, b: BackoffPolicy): boolean {
  return (
    a.jitter === b.jitter && a.firstMs === b.firstMs && a.maxMs === b.maxMs && Object.is(a.factor, b.factor)
  );
}

/** @throws MillraceError `invalid_argument`, naming the member and the rule */
export function checkBackoff({ firstMs, maxMs, factor }: BackoffPolicy, path = 'backoff'): void {
  if (!(firstMs > 0)) throw invalidModel(`${path}.firstMs`, 'backoff first_ms must be greater than zero');
  if (!(maxMs >= firstMs)) {
    throw invalidModel(`${path}.maxMs`, `backoff max_ms must be >= first_ms, got ${maxMs} < ${firstMs}`);
  }
  if (!Number.isFinite(factor) || factor < 1) {
    throw invalidModel(`${path}.factor`, `backoff factor must be finite and >= 1.0, got ${factor}`);
  }
}

/** @throws MillraceError `invalid_argument` for another shape; the bare word `"never"` is none. */
export const parseRestart: Decoder<RestartPolicy> = (value, path) => {
  const raw = object(value, path);
  const type = string(raw['type'], `${path}.type`);
  if (type === 'never' || type === 'onFailure') return { type };
  if (type === 'always') {
    const { intervalMs } = raw;
    if (intervalMs === undefined || intervalMs === null) return { type };
    return { type, intervalMs: counter(intervalMs, `${path}.intervalMs`) };
  }
  throw new MillraceError(
    'invalid_argument',
    `${path}.type must be never, onFailure or always, got ${JSON.stringify(type.slice(0, 80))}`,
  );
};

export function restartToJson(restart: RestartPolicy): JsonObject {
  return restart.type === 'always' && restart.intervalMs !== undefined
    ? { type: 'always', intervalMs: restart.intervalMs }
    : { type: restart.type };
}

/** @throws MillraceError `invalid_argument` for another shape or a missing member, and as {@link checkBackoff} */
export const parseBackoff: Decoder<BackoffPolicy> = (value, path) => {
  const raw = object(value, path);
  const backoff = {
    jitter: parseJitter(raw['jitter'], `${path}.jitter`),
    firstMs: counter(raw['firstMs'], `${path}.firstMs`),
    maxMs: counter(raw['maxMs'], `${path}.maxMs`),
    factor: number(raw['factor'], `${path}.factor`),
  };
  checkBackoff(backoff, path);
  return backoff;
};

export function backoffToJson({ jitter, firstMs, maxMs, factor }: BackoffPolicy): JsonObject {
  return { jitter, firstMs, maxMs, factor };
}

export const parseJitter: Decoder<JitterPolicy> = oneOf(JITTER_POLICIES);
export const parseAdmission: Decoder<AdmissionPolicy> = oneOf(ADMISSION_POLICIES);

function oneOf<T extends string>(words: readonly T[]): Decoder<T> {
  return (value, path) => {
    const word = words.find((known) => known === value);
    if (word !== undefined) return word;
    throw new MillraceError(
      'invalid_argument',
      `${path} must be ${words.join(', ')}, got ${JSON.stringify(string(value, path).slice(0, 80))}`,
    );
  };
}

/**
 * The text form, for command lines: `never` (also empty), `on-failure` or `failure`, `always`, `always:<ms>`. In any case,
 * blanks around it do not matter.
 *
 * @throws MillraceError `invalid_argument`, `unknown restart: …` with the text as given
 */
export function restartFromText(text: string): RestartPolicy {
  const word = text.trim().toLowerCase();
  if (word === '' || word === 'never') return { type: 'never' };
  if (word === 'on-failure' || word === 'failure') return { type: 'onFailure' };
  const [, interval] = /^always(?::\s*(\d*))?$/.exec(word) ?? [null, null];
  if (interval === undefined || interval === '') return { type: 'always' };
  const intervalMs = interval === null ? NaN : Number(interval);
  if (Number.isSafeInteger(intervalMs)) return { type: 'always', intervalMs };
  throw unknownWord('restart', text, 'never, on-failure, always, always:<ms>');
}

export function restartToText(restart: RestartPolicy): string {
  if (restart.type === 'onFailure') return 'on-failure';
  return restart.type === 'always' && restart.intervalMs !== undefined
    ? `always:${restart.intervalMs}`
    : restart.type;
}

/** `full` (also empty and `default`), `none`, `equal`, `decorrelated`. @throws as {@link restartFromText} */
export function jitterFromText(text: string): JitterPolicy {
  const word = text.trim().toLowerCase();
  if (word === '' || word === 'default') return 'full';
  const jitter = JITTER_POLICIES.find((known) => known === word);
  if (jitter !== undefined) return jitter;
  throw unknownWord('jitter', text, JITTER_POLICIES.join(', '));
}

/** `drop-if-running` (also empty and `drop`), `replace`, `queue` (also `add`, `new`). @throws as {@link restartFromText} */
export function admissionFromText(text: string): AdmissionPolicy {
  switch (text.trim().toLowerCase()) {
    case '':
    case 'drop-if-running':
    case 'drop':
      return 'dropIfRunning';
    case 'replace':
      return 'replace';
    case 'queue':
    case 'add':
    case 'new':
      return 'queue';
    default:
      throw unknownWord('admission policy', text, 'drop-if-running, replace, queue');
  }
}

export function admissionToText(admission: AdmissionPolicy): string {
  return admission === 'dropIfRunning' ? 'drop-if-running' : admission;
}
