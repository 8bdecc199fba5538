/**
 * The node's log: one line per fact, as JSON for machines or as text for people, written before the call returns.
 *
 * Secrets do not pass: fields whose name says so are replaced at any depth, and in every text bearer tokens, JWTs and the
 * values given as `secrets`. A line cannot be forged by what is logged: control characters are escaped in both formats,
 * and fields named like the line's own get another name.
 */
import type { Writable } from 'node:stream';
import { truncateUtf8, type Json, type JsonObject, type LogLevel, type Logger } from '@millrace/runner';
import { destination as fileDestination, pino, stdTimeFunctions, type DestinationStream } from 'pino';

export interface LoggerOptions {
  /**
   * - `json`: an object per line with `level`, `time` (ISO 8601), the fields, and `msg`.
   * - `text`: `time LEVEL msg name=value ...`
   */
  readonly format: 'json' | 'text';
  /** The least that is written. */
  readonly level: LogLevel | 'off';
  /** Default: standard error, written synchronously. */
  readonly destination?: Writable;
  /** Values that must never be written, such as the registration credentials. */
  readonly secrets?: readonly string[];
}

const REDACTED = '<redacted>';

/** Longest text in a field, and deepest nesting of fields, that a line keeps. */
const MAX_TEXT_BYTES = 8_192;
const MAX_DEPTH = 8;

export function createLogger(options: LoggerOptions): Logger {
  const sink = options.destination ?? stderr();
  const writer = pino(
    {
      level: options.level === 'off' ? 'silent' : options.level,
      base: null,
      timestamp: stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
    },
    {
      write(line: string) {
        if (options.format === 'text') sink.write(textLine(line));
        // JSON leaves DEL and the controls above it as they are; inside its strings an escape means the same.
        else sink.write(/[\x7f-\x9f\u2028\u2029]/.test(line) ? `${oneLine(line.slice(0, -1))}\n` : line);
      },
    },
  );
  // A key may be quoted with and without its prefix.
  const secrets = (options.secrets ?? []).map((secret) => secret.replace(/^0x(?=[0-9a-f]{64}$)/i, ''));
  return new FieldLogger(writer, new Redaction(secrets), {});
}

class FieldLogger implements Logger {
  readonly #writer: pino.Logger;
  readonly #redaction: Redaction;
  readonly #fields: JsonObject;

  constructor(writer: pino.Logger, redaction: Redaction, fields: JsonObject) {
    this.#writer = writer;
    this.#redaction = redaction;
    this.#fields = fields;
  }

  debug(message: string, fields?: JsonObject): void {
    this.#write('debug', message, fields);
  }

  info(message: string, fields?: JsonObject): void {
    this.#write('info', message, fields);
  }

  warn(message: string, fields?: JsonObject): void {
    this.#write('warn', message, fields);
  }

  error(message: string, fields?: JsonObject): void {
    this.#write('error', message, fields);
  }

  child(fields: JsonObject): Logger {
    // Merged here and not by pino, whose child repeats a name that a line gives anew.
    return new FieldLogger(this.#writer, this.#redaction, this.#with(fields));
  }

  #write(level: LogLevel, message: string, fields?: JsonObject): void {
    if (!this.#writer.isLevelEnabled(level)) return;
    this.#writer[level](fields ? this.#with(fields) : this.#fields, this.#redaction.text(message));
  }

  /** This logger's fields, which are fit to be written, and these, made so. */
  #with(fields: JsonObject): JsonObject {
    const merged = new Map(Object.entries(this.#fields));
    for (const [name, value] of Object.entries(fields)) {
      merged.set(OWN_NAMES.has(name) ? `${name}_` : name, this.#redaction.value(name, value));
    }
    return Object.fromEntries(merged);
  }
}

const OWN_NAMES: ReadonlySet<string> = new Set(['level', 'time', 'msg']);

/** Ends of names that hold secrets, spelled without `_` and `-` and in lower case. */
const SECRET_NAME =
  /(?:token|secret|password|passphrase|credentials?|signature|authorization|cookie|privatekey(?:hex)?|privhex|apikey)$/;

/** Names seen, and what was found; code logs few names, a runner's fields may bring any. */
const KNOWN_NAMES = new Map<string, boolean>();
const MAX_KNOWN_NAMES = 1_000;

function isSecretName(name: string): boolean {
  let secret = KNOWN_NAMES.get(name);
  if (secret === undefined) {
    secret = SECRET_NAME.test(name.replace(/[-_]/g, '').toLowerCase());
    if (KNOWN_NAMES.size < MAX_KNOWN_NAMES) KNOWN_NAMES.set(name, secret);
  }
  return secret;
}

class Redaction {
  readonly #secrets: readonly string[];

  constructor(secrets: readonly string[]) {
    this.#secrets = secrets.filter((secret) => secret !== '');
  }

  value(name: string, value: Json, depth = 0): Json {
    if (value === null || value === undefined) return value;
    if (isSecretName(name)) return REDACTED;
    if (typeof value === 'string') return this.text(value);
    if (typeof value !== 'object') return value;
    if (depth >= MAX_DEPTH) return '<too deep>';
    if (Array.isArray(value)) return value.map((item) => this.value('', item, depth + 1));
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [key, this.value(key, item, depth + 1)]),
    );
  }

  text(text: string): string {
    let clean = text;
    if (/bearer\s/i.test(text)) clean = clean.replace(/\b(bearer\s+)\S+/gi, `$1${REDACTED}`);
    if (text.includes('eyJ')) clean = clean.replace(/\beyJ[\w-]+\.[\w-]+\.[\w-]*/g, REDACTED);
    for (const secret of this.#secrets) {
      if (clean.includes(secret)) clean = clean.replaceAll(secret, REDACTED);
    }
    return truncateUtf8(clean, MAX_TEXT_BYTES);
  }
}

/** A JSON line as text. Text is quoted where it would be mistaken for something else. */
function textLine(line: string): string {
  const { level, time, msg, ...fields } = JSON.parse(line) as JsonObject &
    Record<'level' | 'time' | 'msg', string>;
  const parts = [time, level.toUpperCase().padEnd(5), oneLine(msg)];
  for (const [name, value] of Object.entries(fields)) {
    const text = typeof value === 'string' ? value : JSON.stringify(value);
    const plain = typeof value !== 'string' || /^[^\s"=\p{Cc}]+$/u.test(text);
    parts.push(`${oneLine(name)}=${oneLine(plain ? text : JSON.stringify(text))}`);
  }
  return `${parts.join(' ')}\n`;
}

/** Escapes what would end the line or steer a terminal. */
function oneLine(text: string): string {
  return text.replace(
    /[\p{Cc}\u2028\u2029]/gu,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
}

function stderr(): DestinationStream {
  const stream = fileDestination({ fd: 2, sync: true });
  // Whoever read the log is gone. A node does not end its tasks over that, and there is nowhere to tell it.
  stream.on('error', () => undefined);
  return stream;
}
