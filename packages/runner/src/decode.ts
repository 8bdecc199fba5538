/**
 * The decoding rules of the posemesh wire (the reference node's, section by section the same): what a lease, a task
 * or a heartbeat answer may look like. Everything past this file trusts its types.
 *
 * - Unknown members are ignored. A known member given twice is an error (only visible in text: {@link parseLeaseJson}).
 * - UUIDs: hyphenated in any case, bare, braced or `urn:uuid:`; normalised to hyphenated lower case.
 * - Timestamps: RFC 3339 with `Z` or an offset. Numbers are errors.
 * - URLs: absolute. The empty string is an error.
 * - Counters: JSON integers >= 0; `1.0` is an error (only visible in text). `priority` is a signed 64-bit integer.
 * - Decimal amounts are strings.
 * - Absent and `null` are the same, except: `cancel` may be absent but not null, `task.inputs_cids` likewise, and
 *   `task`, `task.id`, `task.capability` must be present.
 */
import { MillraceError } from './errors.ts';
import type { Json } from './json.ts';
import type { LeaseEnvelope, TaskSpec } from './lease.ts';
import { isTraceparent } from './trace.ts';

/** A JSON object from outside. */
export type RawObject = Readonly<Record<string, unknown>>;

/** Reads one member; `path` names it in errors. */
export type Decoder<T> = (value: unknown, path: string) => T;

function fail(path: string, rule: string, got: string): never {
  throw new MillraceError('invalid_argument', `${path} must be ${rule}, got ${got}`);
}

/** A value for an error text: short, and nothing of what is inside objects, which may be a token. */
function show(value: unknown): string {
  if (typeof value === 'string')
    return JSON.stringify(value.length > 80 ? `${value.slice(0, 77)}...` : value);
  if (typeof value === 'number' || typeof value === 'boolean' || value === null) return String(value);
  return kind(value);
}

function kind(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (value === null) return 'null';
  return Array.isArray(value) ? 'an array' : `a value of type ${typeof value}`;
}

export const string: Decoder<string> = (value, path) =>
  typeof value === 'string' ? value : fail(path, 'a string', show(value));

/** A string that error texts never show. */
export const secret: Decoder<string> = (value, path) =>
  typeof value === 'string' ? value : fail(path, 'a string', kind(value));

export const boolean: Decoder<boolean> = (value, path) =>
  typeof value === 'boolean' ? value : fail(path, 'true or false', show(value));

export const object: Decoder<RawObject> = (value, path) =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
    ? (value as RawObject)
    : fail(path, 'a JSON object', kind(value));

/** Any JSON; absent is null. */
export const json: Decoder<Json> = (value) => (value === undefined ? null : (value as Json));

/** Any finite number. */
export const number: Decoder<number> = (value, path) =>
  typeof value === 'number' && Number.isFinite(value) ? value : fail(path, 'a number', show(value));

/** An integer that JavaScript can hold exactly. */
export const integer: Decoder<number> = (value, path) =>
  typeof value === 'number' && Number.isSafeInteger(value) ? value : fail(path, 'an integer', show(value));

/** A signed 64-bit integer; beyond ±2^53 the nearest number JavaScript has. */
export const integer64: Decoder<number> = (value, path) =>
  typeof value === 'number' && Number.isInteger(value) && Math.abs(value) <= 2 ** 63
    ? value
    : fail(path, 'a signed 64-bit integer', show(value));

/** An integer >= 0 that JavaScript can hold exactly. */
export const counter: Decoder<number> = (value, path) =>
  typeof value === 'number' && Number.isSafeInteger(value) && value >= 0
    ? value
    : fail(path, 'an integer >= 0', show(value));

const UUID_TEXT = /^(?:urn:uuid:)?([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{12})$/i;
const UUID_BARE = /^([0-9a-f]{8})([0-9a-f]{4})([0-9a-f]{4})([0-9a-f]{4})([0-9a-f]{12})$/i;

/** Normalised to hyphenated lower case. */
export const uuid: Decoder<string> = (value, path) => {
  if (typeof value !== 'string') return fail(path, 'a UUID', show(value));
  const text =
    value.length === 38 && value.startsWith('{') && value.endsWith('}') ? value.slice(1, -1) : value;
  const match = UUID_TEXT.exec(text) ?? UUID_BARE.exec(text);
  return match ? match.slice(1).join('-').toLowerCase() : fail(path, 'a UUID', show(value));
};

const RFC3339 = /^(\d{4})-(\d{2})-(\d{2})[Tt ](\d{2}):(\d{2}):(\d{2})((?:\.\d+)?)([Zz]|[+-]\d{2}:\d{2})$/;

/** Kept as the text it was; {@link timestampMs} gives the number. */
export const timestamp: Decoder<string> = (value, path) =>
  typeof value === 'string' && Number.isFinite(timestampMs(value))
    ? value
    : fail(path, 'an RFC 3339 time with Z or an offset', show(value));

/** Milliseconds since the epoch of an RFC 3339 text; NaN for other text and for times that do not exist. */
export function timestampMs(text: string): number {
  const match = RFC3339.exec(text);
  if (!match) return NaN;
  const [, year, month, day, hour, minute, second, fraction, zone] = match;
  // Date.parse takes the 30th of February for the 2nd of March and 24:00 for the next day.
  const lastDay = new Date(new Date(0).setUTCFullYear(Number(year), Number(month), 0)).getUTCDate();
  if (Number(day) > lastDay || Number(hour) > 23) return NaN;
  // A leap second is valid RFC 3339 and unknown to Date.parse.
  const leap = second === '60';
  const ms = Date.parse(
    `${year}-${month}-${day}T${hour}:${minute}:${leap ? '59' : second}${fraction}${zone}`.toUpperCase(),
  );
  return leap ? ms + 1000 : ms;
}

/** An absolute URL, kept as it was written but for white space around it. */
export const url: Decoder<string> = (value, path) =>
  typeof value === 'string' && URL.canParse(value)
    ? value.trim()
    : fail(path, 'an absolute URL', show(value));

/** Absent and null are null. */
export function optional<T>(decode: Decoder<T>): Decoder<T | null> {
  return (value, path) => (value === undefined || value === null ? null : decode(value, path));
}

/** Absent gives `fallback()`; null is an error of the inner rule. */
export function absent<T>(decode: Decoder<T>, fallback: () => T): Decoder<T> {
  return (value, path) => (value === undefined ? fallback() : decode(value, path));
}

export function arrayOf<T>(decode: Decoder<T>): Decoder<T[]> {
  return (value, path) =>
    Array.isArray(value)
      ? value.map((item, index) => decode(item, `${path}[${index}]`))
      : fail(path, 'an array', show(value));
}

const TASK: { readonly [K in keyof TaskSpec]: Decoder<TaskSpec[K]> } = {
  id: uuid,
  job_id: optional(uuid),
  capability: string,
  capability_filters: json,
  inputs_cids: absent(arrayOf(string), () => []),
  outputs_prefix: optional(string),
  label: optional(string),
  stage: optional(string),
  meta: json,
  priority: optional(integer64),
  attempts: optional(counter),
  max_attempts: optional(counter),
  deps_remaining: optional(counter),
  status: optional(string),
  mode: optional(string),
  organization_filter: optional(string),
  billing_units: optional(string),
  estimated_credit_cost: optional(string),
  debited_amount: optional(string),
  debited_at: optional(timestamp),
  lease_expires_at: optional(timestamp),
};

/** @throws MillraceError `invalid_argument` naming the member, the rule and the value. */
export const parseTaskSpec = (value: unknown, path = 'task'): TaskSpec => members(TASK, value, path);

const LEASE: { readonly [K in keyof LeaseEnvelope]: Decoder<LeaseEnvelope[K]> } = {
  access_token: optional(secret),
  access_token_expires_at: optional(timestamp),
  lease_expires_at: optional(timestamp),
  cancel: absent(boolean, () => false),
  status: optional(string),
  domain_id: optional(uuid),
  domain_server_url: optional(url),
  task: parseTaskSpec,
};

/** @throws MillraceError `invalid_argument` naming the member, the rule and the value. */
export const parseLease = (value: unknown, path = 'lease'): LeaseEnvelope => {
  const lease = members(LEASE, value, path);
  // A trace that cannot be read is as good as none, and no reason to refuse the work.
  const { traceparent } = value as RawObject;
  return isTraceparent(traceparent) ? { ...lease, traceparent } : lease;
};

/** The members that are integers on this wire, where `1.0` is refused although JavaScript reads it as 1. */
const INTEGERS: ReadonlySet<string> = new Set([
  'priority',
  'attempts',
  'max_attempts',
  'deps_remaining',
  'chainId',
]);

/**
 * {@link parseLease} from text, in which also a known member given twice and an integer written as `1.0` show.
 *
 * @throws MillraceError `invalid_argument`
 */
export function parseLeaseJson(text: string): LeaseEnvelope {
  const value = parseJson(text, 'lease');
  checkSpelling(LEASE, text, 'lease');
  return parseLease(value);
}

/**
 * What `JSON.parse` hides and the wire refuses: a member of `shape` given twice, an integer written as `1.0`; in the object
 * itself and in its `task`, if `shape` has one. `text` must be valid JSON.
 *
 * @throws MillraceError `invalid_argument` naming the member
 */
export function checkSpelling(shape: object, text: string, path: string): void {
  const hasTask = Object.hasOwn(shape, 'task');
  for (const { parent, key, repeated, number } of membersInText(text, hasTask ? 2 : 1)) {
    const inTask = parent.length === 1 && parent[0] === 'task';
    if (parent.length > 0 && !inTask) continue;
    if (!Object.hasOwn(inTask ? TASK : shape, key)) continue;
    const name = inTask ? `${path}.task.${key}` : `${path}.${key}`;
    if (repeated) throw new MillraceError('invalid_argument', `${name} must be given once, got it twice`);
    if (number !== null && INTEGERS.has(key) && !/^-?\d+$/.test(number)) {
      fail(name, 'an integer', number.slice(0, 40));
    }
  }
}

/** Decodes the listed members of an object and drops all others. */
export function members<T extends object>(
  shape: { readonly [K in keyof T]: Decoder<T[K]> },
  value: unknown,
  path: string,
): T {
  const raw = object(value, path);
  const result: Partial<T> = {};
  for (const key of Object.keys(shape) as (keyof T & string)[]) {
    result[key] = shape[key](Object.hasOwn(raw, key) ? raw[key] : undefined, `${path}.${key}`);
  }
  return result as T;
}

/** @throws MillraceError `invalid_argument` for text that is not JSON; the text itself is not repeated. */
export function parseJson(text: string, what: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    // Not kept as the cause: the engine's message quotes the text, which may hold tokens.
    const position = error instanceof Error ? /at position \d+/.exec(error.message)?.[0] : undefined;
    throw new MillraceError(
      'invalid_argument',
      `${what} must be valid JSON, got ${text.length} characters that are not${position ? ` (error ${position})` : ''}`,
    );
  }
}

/** A member as it stands in JSON text. */
export interface MemberInText {
  /** The keys that lead to its object; `[]` for an array on the way. Empty for the outermost object. */
  readonly parent: readonly string[];
  readonly key: string;
  /** The object has given this key before. */
  readonly repeated: boolean;
  /** The value as written when it is a number, else null. */
  readonly number: string | null;
}

/**
 * The members of all objects up to `maxDepth` levels deep (the outermost is level 1), in order, with what `JSON.parse`
 * hides: repeated keys and the spelling of numbers. `text` must be valid JSON.
 */
export function* membersInText(text: string, maxDepth: number): Generator<MemberInText> {
  const NUMBER = /[-+.\deE]+/y;
  // One per open object or array; `keys` is null for arrays and for objects deeper than asked for.
  const stack: { keys: Set<string> | null; key: string }[] = [];
  let expectsKey = false;
  let pending: Omit<MemberInText, 'number'> | null = null;
  for (let at = 0; at < text.length; at += 1) {
    const char = text[at]!;
    if (char === ' ' || char === '\n' || char === '\r' || char === '\t' || char === ':') continue;
    const top = stack.at(-1);
    if (char === '"' && expectsKey && top?.keys) {
      const end = closingQuote(text, at);
      const key = String(JSON.parse(text.slice(at, end + 1)));
      pending = { parent: stack.slice(0, -1).map((frame) => frame.key), key, repeated: top.keys.has(key) };
      top.keys.add(key);
      top.key = key;
      expectsKey = false;
      at = end;
    } else if (char === ',' || char === '}' || char === ']') {
      if (char !== ',') stack.pop();
      expectsKey = char === ',';
    } else {
      // The first character of a value (or of a key too deep to matter, which is skipped like one).
      NUMBER.lastIndex = at;
      const number = NUMBER.exec(text)?.[0] ?? null;
      if (pending) yield { ...pending, number };
      pending = null;
      expectsKey = char === '{';
      if (char === '{' || char === '[') {
        const named = char === '{' && stack.length < maxDepth;
        stack.push({ keys: named ? new Set() : null, key: '[]' });
      } else if (char === '"') {
        at = closingQuote(text, at);
      } else if (number !== null) {
        at += number.length - 1;
      }
    }
  }
}

/** Index of the quote that ends the string which starts at `start`. */
function closingQuote(text: string, start: number): number {
  let end = text.indexOf('"', start + 1);
  for (;;) {
    let slashes = 0;
    while (text[end - 1 - slashes] === '\\') slashes += 1;
    if (end === -1 || slashes % 2 === 0) return end;
    end = text.indexOf('"', end + 1);
  }
}
