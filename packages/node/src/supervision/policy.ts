/**
 * What a task asks of its supervision, within what the operator allows.
 *
 * A task says it in its `meta`, under `supervision`, in the words of the model; all members may be absent:
 *
 *     {"supervision": {"restart": {"type": "onFailure"}, "maxRetries": 3, "timeout": 60000,
 *                      "backoff": {"firstMs": 500}, "slot": "camera-1", "admission": "queue"}}
 */
import { MillraceError, type Json, type JsonObject } from '@millrace/runner';
import { counter, object, string, type RawObject } from '@millrace/runner/decode';
import {
  DEFAULT_BACKOFF,
  backoffToJson,
  checkSlot,
  parseAdmission,
  parseBackoff,
  parseRestart,
  type AdmissionPolicy,
  type BackoffPolicy,
  type RestartPolicy,
  type Slot,
} from '@millrace/runner/model';

/** The JSON of `meta.supervision`. */
export interface SupervisionRequest {
  /** The lane the task belongs to. Default: one of its own. */
  readonly slot?: string;
  /** When the lane is taken. Default `dropIfRunning`. */
  readonly admission?: AdmissionPolicy;
  /** Of one try, milliseconds. Default: the attempt's. */
  readonly timeout?: number;
  /** Default `{"type": "never"}`. */
  readonly restart?: RestartPolicy;
  /** Default full jitter, 1,000 ms, doubling, up to 30,000 ms; each member by itself. */
  readonly backoff?: Partial<BackoffPolicy>;
  /** Tries after the first one of a streak of failures. Default, and 0: without limit. */
  readonly maxRetries?: number;
}

/** An operator's bounds. */
export interface SupervisionOptions {
  /** For tasks that do not say; what a task says wins, member by member. Default: one try. */
  readonly defaults?: SupervisionRequest;
  /** The most a task may ask for: `never`, `onFailure` or `always`. Default `always`. */
  readonly restart?: RestartPolicy['type'];
  /** The most retries of a streak of failures; also for tasks that set no limit. Default: none. */
  readonly maxRetries?: number;
  /** The longest time for one try; also for tasks that set none. Default: that of the attempt. */
  readonly timeoutMs?: number;
  /** Between two tries at least. Default 100 ms. */
  readonly floorMs?: number;
  /** Tasks that may wait for one lane. Default 100; 0: none. */
  readonly queueLimit?: number;
}

/** Everything decided. */
export interface Supervision {
  /** The lane it shares; null: it has its own. */
  readonly lane: Slot | null;
  readonly admission: AdmissionPolicy;
  /** Null: nothing but the attempt's own limit. */
  readonly timeoutMs: number | null;
  readonly restart: RestartPolicy;
  readonly backoff: BackoffPolicy;
  /** Null: without limit. */
  readonly maxRetries: number | null;
  readonly floorMs: number;
  readonly queueLimit: number;
}

export const DEFAULT_FLOOR_MS = 100;
export const DEFAULT_QUEUE_LIMIT = 100;

const MEMBERS = ['slot', 'admission', 'timeout', 'restart', 'backoff', 'maxRetries'];
const RESTARTS: readonly RestartPolicy['type'][] = ['never', 'onFailure', 'always'];

type Asked = Pick<Supervision, 'lane' | 'admission' | 'timeoutMs' | 'restart' | 'maxRetries'> & {
  readonly backoff: Readonly<Record<string, unknown>>;
};

const NOTHING_ASKED: Asked = {
  lane: null,
  admission: 'dropIfRunning',
  timeoutMs: null,
  restart: { type: 'never' },
  backoff: {},
  maxRetries: null,
};

/** The bounds of one runner, checked once. */
export class SupervisionBounds {
  readonly #options: SupervisionOptions;
  readonly #defaults: Asked;
  /** For a task that says nothing. */
  readonly #unasked: Supervision;

  /** @throws MillraceError `invalid_argument`, naming the member */
  constructor(options: SupervisionOptions = {}, path = 'supervision') {
    const { restart, maxRetries, timeoutMs, floorMs, queueLimit, defaults } = options;
    if (restart !== undefined && !RESTARTS.includes(restart)) {
      throw new MillraceError(
        'invalid_argument',
        `${path}.restart must be never, onFailure or always, got ${JSON.stringify(restart)}`,
      );
    }
    if (maxRetries !== undefined) counter(maxRetries, `${path}.maxRetries`);
    if (floorMs !== undefined) counter(floorMs, `${path}.floorMs`);
    if (queueLimit !== undefined) counter(queueLimit, `${path}.queueLimit`);
    if (timeoutMs !== undefined) positive(timeoutMs, `${path}.timeoutMs`);
    this.#options = options;
    this.#defaults =
      defaults === undefined ? NOTHING_ASKED : parseRequest(defaults, `${path}.defaults`, NOTHING_ASKED);
    this.#unasked = this.#within(this.#defaults, `${path}.defaults`);
  }

  /**
   * What a task with this `meta` gets.
   *
   * @throws MillraceError `invalid_argument` for a request that cannot be read, naming its member; `permission_denied` for more than
   * is allowed here
   */
  of(meta: Json): Supervision {
    const request = isObject(meta) ? meta['supervision'] : undefined;
    if (request === undefined) return this.#unasked;
    return this.#within(parseRequest(request, 'meta.supervision', this.#defaults), 'meta.supervision');
  }

  #within(asked: Asked, path: string): Supervision {
    const { restart = 'always', maxRetries, timeoutMs, floorMs, queueLimit } = this.#options;
    if (RESTARTS.indexOf(asked.restart.type) > RESTARTS.indexOf(restart)) {
      throw new MillraceError(
        'permission_denied',
        `${path}.restart must be at most ${restart}, which is what this node allows, got ${asked.restart.type}`,
      );
    }
    return {
      lane: asked.lane,
      admission: asked.admission,
      restart: asked.restart,
      backoff: parseBackoff({ ...backoffToJson(DEFAULT_BACKOFF), ...asked.backoff }, `${path}.backoff`),
      // Zero is the word for no limit.
      maxRetries: bounded(asked.maxRetries || null, maxRetries ?? null, `${path}.maxRetries`),
      timeoutMs: bounded(asked.timeoutMs, timeoutMs ?? null, `${path}.timeout`),
      floorMs: floorMs ?? DEFAULT_FLOOR_MS,
      queueLimit: queueLimit ?? DEFAULT_QUEUE_LIMIT,
    };
  }
}

function bounded(asked: number | null, most: number | null, path: string): number | null {
  if (most === null) return asked;
  if (asked === null || asked <= most) return asked ?? most;
  throw new MillraceError(
    'permission_denied',
    `${path} must be at most ${most}, which is what this node allows, got ${asked}`,
  );
}

function parseRequest(value: unknown, path: string, defaults: Asked): Asked {
  const raw = object(value, path);
  onlyMembers(raw, MEMBERS, path);
  const lane = raw['slot'] === undefined ? defaults.lane : string(raw['slot'], `${path}.slot`);
  if (lane !== null) checkSlot(lane, `${path}.slot`);
  const given = <T>(key: string, parse: (value: unknown, path: string) => T, otherwise: T): T =>
    raw[key] === undefined ? otherwise : parse(raw[key], `${path}.${key}`);
  const backoff = given('backoff', object, {});
  onlyMembers(backoff, Object.keys(DEFAULT_BACKOFF), `${path}.backoff`);
  return {
    lane,
    admission: given('admission', parseAdmission, defaults.admission),
    timeoutMs: given('timeout', positive, defaults.timeoutMs),
    restart: given('restart', parseRestart, defaults.restart),
    backoff: { ...defaults.backoff, ...backoff },
    maxRetries: given('maxRetries', counter, defaults.maxRetries),
  };
}

/** A misspelt policy must not be a missing one. */
function onlyMembers(raw: RawObject, known: readonly string[], path: string): void {
  const unknown = Object.keys(raw).find((key) => !known.includes(key));
  if (unknown === undefined) return;
  throw new MillraceError(
    'invalid_argument',
    `${path}.${unknown} is unknown; ${path} may have: ${known.join(', ')}`,
  );
}

function positive(value: unknown, path: string): number {
  const ms = counter(value, path);
  if (ms > 0) return ms;
  throw new MillraceError('invalid_argument', `${path}: timeout must be greater than zero`);
}

function isObject(value: Json): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
