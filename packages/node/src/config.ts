/**
 * The node's configuration: from a record shaped like the environment to a frozen, typed object. Every variable of
 * the reference compute node is here with its default and its rules of parsing; `docs/configuration.md` is the
 * table for operators.
 *
 * Two ways of reading a variable: *lenient*, surrounding blanks are removed and a blank value counts as unset; and
 * *strict*, the value is used as it stands and a blank one is an error. Values the reference node tolerates are
 * tolerated (swapped bounds, ratios out of range), values no node can work with are refused.
 */
import { MillraceError, type LogLevel } from '@millrace/runner';
import {
  formatResources,
  parseResourceList,
  walletAddress,
  type ProxySettings,
  type Resources,
} from '@millrace/dispatch/client';
import { z } from 'zod';
import { ENGINE_VERSION, registrationVersion } from './version.ts';

/** What a node needs to know. Made by {@link parseNodeEnv}; durations are milliseconds. */
export interface NodeConfig {
  /** Where tasks come from. Without a trailing slash. */
  readonly dmsBaseUrl: string;
  /** Limit of each request to DMS and DDS. At least 1,000. */
  readonly requestTimeoutMs: number;
  /** As configured; `registrationVersion` makes it the SemVer that is sent. */
  readonly nodeVersion: string;
  /** Where the node registers and logs in. Without a trailing slash. */
  readonly ddsBaseUrl: string;
  /** Secret. Sent verbatim as `registration_credentials`. */
  readonly regSecret: string;
  /** Secret. A valid secp256k1 key: 64 hex digits, `0x` before them allowed. */
  readonly privateKeyHex: string;
  /** How long tasks go on after their lease is over while the dispatcher cannot be reached; 0: not at all. */
  readonly contactGraceMs: number;
  /** Read for compatibility; heartbeats do not use it. */
  readonly heartbeatJitterMs: number;
  /** Any finite number; may be above `heartbeatMaxRatio`, and both outside 0 to 1. */
  readonly heartbeatMinRatio: number;
  readonly heartbeatMaxRatio: number;
  /** May be above `pollBackoffMaxMs`. */
  readonly pollBackoffMinMs: number;
  readonly pollBackoffMaxMs: number;
  /** Part of a token's lifetime after which it is refreshed, 0 to 1. */
  readonly tokenSafetyRatio: number;
  /** Login attempts beyond the first. */
  readonly tokenReauthMaxRetries: number;
  /** Spread of the refresh point, and upper bound of the pause between login attempts. */
  readonly tokenReauthJitterMs: number;
  /** Cooldown of the registration loop. At least 1,000. */
  readonly registerIntervalMs: number;
  /** Transient failures in a row before a cooldown; -1 for never. */
  readonly registerMaxRetry: number;
  /** Leases held at once. At least 1. */
  readonly maxConcurrency: number;
  /** What the node has to give to its tasks. Null: it does not say, and only {@link maxConcurrency} bounds them. */
  readonly resources: Resources | null;
  readonly logFormat: 'json' | 'text';
  readonly logLevel: LogLevel | 'off';
  /** Adds the no-op runner. */
  readonly enableNoop: boolean;
  readonly noopSleepMs: number;
  /** Sent as `posemesh-client-id`; null lets the node choose one for the life of the process. */
  readonly clientId: string | null;
  /** Which requests go through a proxy. */
  readonly proxy: ProxySettings;
}

/** One line of {@link describeConfig}. */
export interface ConfigEntry {
  /** The variable's name. */
  readonly name: string;
  /** The effective value in the variable's own unit; null when there is none. Secrets are `<redacted>`. */
  readonly value: string | number | boolean | null;
  /** The variable of the environment that said so, or null for the default. */
  readonly source: string | null;
}

/** Environment variables by name, such as `process.env`. */
export type Env = Readonly<Record<string, string | undefined>>;

/** Leases of a node that counts what tasks take and says no other number. */
const COUNTED_CONCURRENCY = 1000;

const U32_MAX = 2n ** 32n - 1n;
const U64_MAX = 2n ** 64n - 1n;
const I32_MAX = 2n ** 31n - 1n;

const LEVELS: Readonly<Record<string, LogLevel | 'off'>> = {
  off: 'off',
  error: 'error',
  warn: 'warn',
  info: 'info',
  debug: 'debug',
  // Nothing here is finer than debug.
  trace: 'debug',
};

interface Variable<T> {
  /** Lenient: blanks around the value are removed and a blank value is unset. */
  readonly lenient: boolean;
  /** What an unset variable means, as it would be written. Null: nothing, or that it is required. */
  readonly fallback: string | null;
  readonly required: boolean;
  readonly schema: z.ZodType<T, string>;
}

const lenient = <T>(fallback: string, schema: z.ZodType<T, string>): Variable<T> => ({
  lenient: true,
  fallback,
  required: false,
  schema,
});
const strict = <T>(fallback: string, schema: z.ZodType<T, string>): Variable<T> => ({
  lenient: false,
  fallback,
  required: false,
  schema,
});
const optional = <T>(schema: z.ZodType<T, string>): Variable<T | null> => ({
  lenient: true,
  fallback: null,
  required: false,
  schema,
});
const required = <T>(schema: z.ZodType<T, string>): Variable<T> => ({
  lenient: true,
  fallback: null,
  required: true,
  schema,
});

// In the order of the reference's own checks, which is the order problems are reported in.
const VARIABLES = {
  DMS_BASE_URL: lenient('https://dms.auki.network/v1', httpUrl('DMS_BASE_URL')),
  REQUEST_TIMEOUT_SECS: lenient('60', integer('REQUEST_TIMEOUT_SECS', 0n, U64_MAX)),
  NODE_VERSION: lenient(ENGINE_VERSION, z.string()),
  DDS_BASE_URL: lenient('https://dds.auki.network', httpUrl('DDS_BASE_URL')),
  REG_SECRET: required(z.string()),
  SECP256K1_PRIVHEX: required(privateKey()),
  HEARTBEAT_JITTER_MS: strict('250', integer('HEARTBEAT_JITTER_MS', 0n, U64_MAX)),
  HEARTBEAT_MIN_RATIO: strict('0.25', float('HEARTBEAT_MIN_RATIO')),
  HEARTBEAT_MAX_RATIO: strict('0.35', float('HEARTBEAT_MAX_RATIO')),
  POLL_BACKOFF_MS_MIN: strict('1000', integer('POLL_BACKOFF_MS_MIN', 0n, U64_MAX)),
  POLL_BACKOFF_MS_MAX: strict('30000', integer('POLL_BACKOFF_MS_MAX', 0n, U64_MAX)),
  TOKEN_SAFETY_RATIO: strict('0.75', float('TOKEN_SAFETY_RATIO')),
  TOKEN_REAUTH_MAX_RETRIES: strict('3', integer('TOKEN_REAUTH_MAX_RETRIES', 0n, U32_MAX)),
  TOKEN_REAUTH_JITTER_MS: strict('500', integer('TOKEN_REAUTH_JITTER_MS', 0n, U64_MAX)),
  REGISTER_INTERVAL_SECS: lenient('120', integer('REGISTER_INTERVAL_SECS', 0n, U64_MAX)),
  REGISTER_MAX_RETRY: lenient('-1', retryLimit('REGISTER_MAX_RETRY')),
  MAX_CONCURRENCY: strict('1', integer('MAX_CONCURRENCY', 0n, U32_MAX)),
  // Ours, like what follows on HTTP.
  RESOURCES: optional(resourceList('RESOURCES')),
  LOG_FORMAT: lenient(
    'json',
    z.string().transform((text) => (text.toLowerCase() === 'text' ? ('text' as const) : ('json' as const))),
  ),
  ENABLE_NOOP: strict('false', flag('ENABLE_NOOP')),
  NOOP_SLEEP_SECS: strict('5', integer('NOOP_SLEEP_SECS', 0n, U64_MAX)),
  CLIENT_ID: optional(headerValue('CLIENT_ID')),
  LOG_LEVEL: optional(logLevel('LOG_LEVEL')),
  // A filter that a Rust program refuses only loses it its logs; so anything is accepted here.
  RUST_LOG: lenient(
    'info',
    z.string().transform((text) => logLevelOf(text) ?? 'info'),
  ),
  // Ours.
  CONTACT_GRACE_SECONDS: lenient('120', integer('CONTACT_GRACE_SECONDS', 0n, U32_MAX)),
  // Not the node's own, but those of every program on the machine; what others make of them is no error here either.
  HTTP_PROXY: optional(z.string().transform(proxyUrl)),
  HTTPS_PROXY: optional(z.string().transform(proxyUrl)),
  ALL_PROXY: optional(z.string().transform(proxyUrl)),
  NO_PROXY: optional(z.string()),
} as const;

/** These are also read in lower case, as everywhere. */
const ANY_CASE: ReadonlySet<string> = new Set(['HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'NO_PROXY']);

type Name = keyof typeof VARIABLES;
const NAMES = Object.keys(VARIABLES) as Name[];
type Values = {
  readonly [N in Name]: (typeof VARIABLES)[N] extends Variable<infer T> ? T : never;
};

/**
 * Reads a node's configuration.
 *
 * @throws MillraceError `invalid_argument` listing all problems, one on a line, in `details.variables` by name
 */
export function parseNodeEnv(env: Env): NodeConfig {
  const values = readAll(env);
  return Object.freeze({
    dmsBaseUrl: values.DMS_BASE_URL,
    // The reference's registration client takes 0 as 1 too; its task client would fail every request.
    requestTimeoutMs: secondsToMs(Math.max(1, values.REQUEST_TIMEOUT_SECS)),
    nodeVersion: values.NODE_VERSION,
    ddsBaseUrl: values.DDS_BASE_URL,
    regSecret: values.REG_SECRET,
    privateKeyHex: values.SECP256K1_PRIVHEX,
    contactGraceMs: secondsToMs(values.CONTACT_GRACE_SECONDS),
    heartbeatJitterMs: values.HEARTBEAT_JITTER_MS,
    heartbeatMinRatio: values.HEARTBEAT_MIN_RATIO,
    heartbeatMaxRatio: values.HEARTBEAT_MAX_RATIO,
    pollBackoffMinMs: values.POLL_BACKOFF_MS_MIN,
    pollBackoffMaxMs: values.POLL_BACKOFF_MS_MAX,
    tokenSafetyRatio: Math.min(1, Math.max(0, values.TOKEN_SAFETY_RATIO)),
    tokenReauthMaxRetries: values.TOKEN_REAUTH_MAX_RETRIES,
    tokenReauthJitterMs: values.TOKEN_REAUTH_JITTER_MS,
    registerIntervalMs: secondsToMs(Math.max(1, values.REGISTER_INTERVAL_SECS)),
    registerMaxRetry: values.REGISTER_MAX_RETRY,
    // The reference reads it and does one task at a time, also with 0; a node that obeys 0 would never lease.
    maxConcurrency:
      values.RESOURCES !== null && textOf(env, 'MAX_CONCURRENCY') === null
        ? COUNTED_CONCURRENCY
        : Math.max(1, values.MAX_CONCURRENCY),
    resources: values.RESOURCES,
    logFormat: values.LOG_FORMAT,
    logLevel: values.LOG_LEVEL ?? values.RUST_LOG,
    enableNoop: values.ENABLE_NOOP,
    noopSleepMs: secondsToMs(values.NOOP_SLEEP_SECS),
    clientId: values.CLIENT_ID,
    proxy: {
      http: values.HTTP_PROXY ?? values.ALL_PROXY,
      https: values.HTTPS_PROXY ?? values.ALL_PROXY,
      no: values.NO_PROXY ?? '',
    },
  });
}

/**
 * The effective value of every variable and where it came from, in a fixed order, for people to look at. Secrets are
 * replaced; of the key the wallet is shown, which is public.
 *
 * @throws MillraceError as {@link parseNodeEnv}
 */
export function describeConfig(env: Env): readonly ConfigEntry[] {
  const config = parseNodeEnv(env);
  const values = readAll(env);
  const shown: Readonly<Record<Name, ConfigEntry['value']>> = {
    ...values,
    REQUEST_TIMEOUT_SECS: config.requestTimeoutMs / 1000,
    NODE_VERSION: registrationVersion(config.nodeVersion),
    TOKEN_SAFETY_RATIO: config.tokenSafetyRatio,
    REGISTER_INTERVAL_SECS: config.registerIntervalMs / 1000,
    MAX_CONCURRENCY: config.maxConcurrency,
    RESOURCES: config.resources === null ? null : formatResources(config.resources),
    LOG_LEVEL: config.logLevel,
    REG_SECRET: '<redacted>',
    SECP256K1_PRIVHEX: `<redacted> (wallet ${walletAddress(config.privateKeyHex)})`,
    HTTP_PROXY: withoutPassword(values.HTTP_PROXY),
    HTTPS_PROXY: withoutPassword(values.HTTPS_PROXY),
    ALL_PROXY: withoutPassword(values.ALL_PROXY),
  };
  const sourceOf = (name: Name): string | null => (textOf(env, name) === null ? null : spelled(env, name));
  return NAMES.filter((name) => name !== 'RUST_LOG').map((name) => ({
    name,
    value: shown[name],
    source: sourceOf(name) ?? (name === 'LOG_LEVEL' ? sourceOf('RUST_LOG') : null),
  }));
}

/** The name under which a variable is set, if it is. */
function spelled(env: Env, name: Name): string {
  return ANY_CASE.has(name) && !env[name]?.trim() ? name.toLowerCase() : name;
}

/** The text a variable gives, or null when it is unset under its own rule. */
function textOf(env: Env, name: Name): string | null {
  const text = env[spelled(env, name)];
  if (text === undefined) return null;
  if (!VARIABLES[name].lenient) return text;
  // The reference trims all of these but NODE_VERSION, which is trimmed where it is used.
  return text.trim() === '' ? null : text.trim();
}

function readAll(env: Env): Values {
  const values: Partial<Record<Name, unknown>> = {};
  const problems: { readonly variable: Name; readonly problem: string }[] = [];
  for (const name of NAMES) {
    const { fallback, required: needed, schema } = VARIABLES[name];
    const text = textOf(env, name) ?? fallback;
    if (text === null) {
      if (needed) problems.push({ variable: name, problem: `${name} required for DDS SIWE authentication` });
      values[name] = null;
      continue;
    }
    const result = schema.safeParse(text);
    if (result.success) values[name] = result.data;
    else problems.push({ variable: name, problem: result.error.issues[0]!.message });
  }
  if (problems.length > 0) {
    const count = problems.length === 1 ? '1 problem' : `${problems.length} problems`;
    throw new MillraceError(
      'invalid_argument',
      `the node's environment has ${count}:\n${problems.map(({ problem }) => `- ${problem}`).join('\n')}`,
      { details: { variables: problems.map(({ variable }) => variable) } },
    );
  }
  return values as Values;
}

function httpUrl(name: string): z.ZodType<string, string> {
  return z.string().transform((text, context) => {
    const url = URL.canParse(text) ? new URL(text) : null;
    if (url === null || !/^https?:$/.test(url.protocol)) {
      return refuse(context, text, `invalid URL in ${name}: must be an absolute http:// or https:// URL`);
    }
    // A trailing slash would give `//tasks`, which services answer with 404.
    return url.origin + url.pathname.replace(/\/+$/, '');
  });
}

/** Decimal, a leading plus allowed; past what JavaScript holds exactly the value is as good as infinite. */
function integer(name: string, min: bigint, max: bigint): z.ZodType<number, string> {
  return z.string().transform((text, context) => {
    const value = /^\+?\d+$/.test(text) ? BigInt(text.replace('+', '')) : null;
    if (value === null || value < min || value > max) {
      return refuse(
        context,
        text,
        `invalid integer in ${name}: must be a whole number from ${min} to ${max}`,
      );
    }
    return Math.min(Number(value), Number.MAX_SAFE_INTEGER);
  });
}

function resourceList(name: string): z.ZodType<Resources | null, string> {
  return z.string().transform((text, context) => {
    try {
      return parseResourceList(text);
    } catch (error) {
      const { message, details } = MillraceError.from(error);
      const which = typeof details['name'] === 'string' ? `${details['name']} ` : '';
      return refuse(context, text, `invalid amounts in ${name}: ${which}${message}`);
    }
  });
}

function retryLimit(name: string): z.ZodType<number, string> {
  return z.string().transform((text, context) => {
    const value = /^[+-]?\d+$/.test(text) ? BigInt(text.replace('+', '')) : null;
    if (value === null || value > I32_MAX || value < -I32_MAX - 1n) {
      return refuse(
        context,
        text,
        `invalid integer in ${name}: must be a whole number from -1 to ${I32_MAX}`,
      );
    }
    if (value < -1n) {
      context.addIssue(`${name} must be -1 or a non-negative integer, got ${value}`);
      return z.NEVER;
    }
    return Number(value);
  });
}

function float(name: string): z.ZodType<number, string> {
  return z.string().transform((text, context) => {
    const value = /^[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?$/i.test(text) ? Number(text) : NaN;
    // The reference reads `inf` and `nan` too, and then fails when it computes with them.
    if (!Number.isFinite(value)) return refuse(context, text, `invalid float in ${name}: must be a number`);
    return value;
  });
}

function flag(name: string): z.ZodType<boolean, string> {
  return z.string().transform((text, context) => {
    if (text !== 'true' && text !== 'false') {
      return refuse(context, text, `invalid bool in ${name}; expected true/false`);
    }
    return text === 'true';
  });
}

function headerValue(name: string): z.ZodType<string, string> {
  return z.string().transform((text, context) => {
    if (!/^[\x20-\x7e]+$/.test(text)) {
      return refuse(
        context,
        text,
        `invalid text in ${name}: must be printable ASCII, as it is sent in a header`,
      );
    }
    return text;
  });
}

/** Null for what is no proxy that can be used, such as one of the SOCKS kind: then there is none. */
function proxyUrl(text: string): string | null {
  const url = /^[a-z][a-z0-9+.-]*:\/\//i.test(text) ? text : `http://${text}`;
  return URL.canParse(url) && /^https?:$/.test(new URL(url).protocol) ? url : null;
}

function withoutPassword(url: string | null): string | null {
  return url === null ? null : url.replace(/\/\/[^/@]*@/, '//<redacted>@');
}

function privateKey(): z.ZodType<string, string> {
  return z.string().transform((text, context) => {
    try {
      walletAddress(text);
      return text;
    } catch (error) {
      // These sentences tell the rule and never the key.
      context.addIssue(MillraceError.from(error).message);
      return z.NEVER;
    }
  });
}

function logLevel(name: string): z.ZodType<LogLevel | 'off', string> {
  return z.string().transform((text, context) => {
    const level = logLevelOf(text);
    if (level !== null) return level;
    return refuse(
      context,
      text,
      `invalid level in ${name}: must be one of ${Object.keys(LEVELS).join(', ')}`,
    );
  });
}

/**
 * Of a filter such as `debug,hyper=warn` the last part that names no module, as Rust programs read it; null when no part is
 * a level.
 */
export function logLevelOf(filter: string): LogLevel | 'off' | null {
  const bare = filter
    .split(',')
    .map((part) => part.trim().toLowerCase())
    .findLast((part) => Object.hasOwn(LEVELS, part));
  return bare === undefined ? null : LEVELS[bare]!;
}

function secondsToMs(seconds: number): number {
  return Math.min(seconds * 1000, Number.MAX_SAFE_INTEGER);
}

/** Ends a transformation with `rule, got "text"`; long texts are cut, and a URL's user and password left out. */
function refuse(context: z.RefinementCtx, text: string, rule: string): never {
  const shown = text.replace(/\/\/[^/@]*@/, '//').slice(0, 100);
  context.addIssue(`${rule}, got ${JSON.stringify(shown)}`);
  return z.NEVER;
}
