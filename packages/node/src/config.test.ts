import { readFileSync } from 'node:fs';
import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { describeConfig, parseNodeEnv, type Env, type NodeConfig } from './config.ts';
import { ENGINE_VERSION } from './version.ts';

const KEY = '4c0883a69102937d6231471b5dbb6204fe5129617082798ce3f4fdf2548b6f90';
const SECRET = 'M2Y2YzFkMGUtN2E1NS00YzVlLTlmMGItMmQ4YTY0YjFjN2U5OnMzY3IzdC12YWx1ZQ==';
const REQUIRED = { REG_SECRET: SECRET, SECP256K1_PRIVHEX: KEY };

const DEFAULTS: NodeConfig = {
  dmsBaseUrl: 'https://dms.auki.network/v1',
  requestTimeoutMs: 60_000,
  nodeVersion: ENGINE_VERSION,
  ddsBaseUrl: 'https://dds.auki.network',
  regSecret: SECRET,
  privateKeyHex: KEY,
  heartbeatJitterMs: 250,
  heartbeatMinRatio: 0.25,
  heartbeatMaxRatio: 0.35,
  contactGraceMs: 120_000,
  pollBackoffMinMs: 1_000,
  pollBackoffMaxMs: 30_000,
  tokenSafetyRatio: 0.75,
  tokenReauthMaxRetries: 3,
  tokenReauthJitterMs: 500,
  registerIntervalMs: 120_000,
  registerMaxRetry: -1,
  maxConcurrency: 1,
  resources: null,
  logFormat: 'json',
  logLevel: 'info',
  enableNoop: false,
  noopSleepMs: 5_000,
  clientId: null,
  proxy: { http: null, https: null, no: '' },
};

const config = (env: Env): NodeConfig => parseNodeEnv({ ...REQUIRED, ...env });

function problems(env: Env): string[] {
  try {
    parseNodeEnv(env);
  } catch (error) {
    if (!MillraceError.is(error)) throw error;
    expect(error.code).toBe('invalid_argument');
    return error.message.split('\n').slice(1);
  }
  throw new Error('nothing was refused');
}

const problem = (env: Env): string => {
  const all = problems({ ...REQUIRED, ...env });
  expect(all).toHaveLength(1);
  return all[0]!;
};

describe('parseNodeEnv', () => {
  test('the two required variables alone give every default, frozen', () => {
    const parsed = config({});
    expect(parsed).toEqual(DEFAULTS);
    expect(Object.isFrozen(parsed)).toBe(true);
  });

  test('every variable is read', () => {
    expect(
      config({
        DMS_BASE_URL: 'http://127.0.0.1:7070/v1',
        REQUEST_TIMEOUT_SECS: '7',
        NODE_VERSION: 'v1.2.3',
        DDS_BASE_URL: 'http://127.0.0.1:7070',
        HEARTBEAT_JITTER_MS: '1',
        HEARTBEAT_MIN_RATIO: '0.1',
        HEARTBEAT_MAX_RATIO: '1e-1',
        POLL_BACKOFF_MS_MIN: '2',
        POLL_BACKOFF_MS_MAX: '3',
        TOKEN_SAFETY_RATIO: '.5',
        TOKEN_REAUTH_MAX_RETRIES: '4',
        TOKEN_REAUTH_JITTER_MS: '5',
        REGISTER_INTERVAL_SECS: '6',
        REGISTER_MAX_RETRY: '0',
        MAX_CONCURRENCY: '8',
        RESOURCES: 'cpu=4, memory=1GiB',
        LOG_FORMAT: 'Text',
        ENABLE_NOOP: 'true',
        NOOP_SLEEP_SECS: '9',
        CLIENT_ID: 'node-1',
        LOG_LEVEL: 'debug',
        CONTACT_GRACE_SECONDS: '10',
        HTTP_PROXY: 'http://proxy:3128',
        HTTPS_PROXY: 'https://user:pass@secure',
        NO_PROXY: 'localhost, 10.0.0.0/8',
      }),
    ).toEqual({
      ...DEFAULTS,
      dmsBaseUrl: 'http://127.0.0.1:7070/v1',
      requestTimeoutMs: 7_000,
      contactGraceMs: 10_000,
      nodeVersion: 'v1.2.3',
      ddsBaseUrl: 'http://127.0.0.1:7070',
      heartbeatJitterMs: 1,
      heartbeatMinRatio: 0.1,
      heartbeatMaxRatio: 0.1,
      pollBackoffMinMs: 2,
      pollBackoffMaxMs: 3,
      tokenSafetyRatio: 0.5,
      tokenReauthMaxRetries: 4,
      tokenReauthJitterMs: 5,
      registerIntervalMs: 6_000,
      registerMaxRetry: 0,
      maxConcurrency: 8,
      resources: { cpu: 4, memory: 1024 ** 3 },
      logFormat: 'text',
      logLevel: 'debug',
      enableNoop: true,
      noopSleepMs: 9_000,
      clientId: 'node-1',
      proxy: {
        http: 'http://proxy:3128',
        https: 'https://user:pass@secure',
        no: 'localhost, 10.0.0.0/8',
      },
    } satisfies NodeConfig);
  });

  test('a node that says what it has holds a thousand tasks at once, unless another number is set', () => {
    expect(config({ RESOURCES: 'cpu=4' }).maxConcurrency).toBe(1000);
    expect(config({ RESOURCES: 'cpu=4', MAX_CONCURRENCY: '3' }).maxConcurrency).toBe(3);
    expect(config({ RESOURCES: ' ' })).toEqual(DEFAULTS);
  });

  test.each([
    [{ ALL_PROXY: 'http://all' }, { http: 'http://all', https: 'http://all', no: '' }],
    [
      { ALL_PROXY: 'http://all', HTTPS_PROXY: 'http://s' },
      { http: 'http://all', https: 'http://s', no: '' },
    ],
    [{ HTTP_PROXY: 'http://p' }, { http: 'http://p', https: null, no: '' }],
    [
      { http_proxy: 'p:3128', no_proxy: '*' },
      { http: 'http://p:3128', https: null, no: '*' },
    ],
    [
      { HTTP_PROXY: 'http://upper', http_proxy: 'http://lower' },
      { http: 'http://upper', https: null, no: '' },
    ],
    [
      { HTTP_PROXY: ' ', http_proxy: 'http://lower' },
      { http: 'http://lower', https: null, no: '' },
    ],
    // What the reference cannot use it does without, and an environment that starts it starts this node.
    [
      { HTTP_PROXY: 'socks5://p', HTTPS_PROXY: 'http://' },
      { http: null, https: null, no: '' },
    ],
  ])('the proxies of %j', (env: Env, proxy) => {
    expect(config(env).proxy).toEqual(proxy);
  });

  test('lenient variables are trimmed, and blank ones are unset', () => {
    const lenient = {
      DMS_BASE_URL: 'http://dms',
      REQUEST_TIMEOUT_SECS: '60',
      NODE_VERSION: '1.0.0',
      DDS_BASE_URL: 'http://dds',
      REGISTER_INTERVAL_SECS: '30',
      REGISTER_MAX_RETRY: '2',
      CLIENT_ID: 'me',
      LOG_FORMAT: 'text',
      LOG_LEVEL: 'warn',
    };
    const padded = Object.fromEntries(Object.entries(lenient).map(([name, text]) => [name, ` ${text}\t\n`]));
    const blank = Object.fromEntries(Object.keys(lenient).map((name) => [name, ' \t']));
    expect(config(padded)).toEqual(config(lenient));
    expect(config(blank)).toEqual(DEFAULTS);
    expect(config({ REG_SECRET: ` ${SECRET} `, SECP256K1_PRIVHEX: `\t0x${KEY}\n` })).toEqual({
      ...DEFAULTS,
      privateKeyHex: `0x${KEY}`,
    });
  });

  test.each([
    'HEARTBEAT_JITTER_MS',
    'HEARTBEAT_MIN_RATIO',
    'HEARTBEAT_MAX_RATIO',
    'POLL_BACKOFF_MS_MIN',
    'POLL_BACKOFF_MS_MAX',
    'TOKEN_SAFETY_RATIO',
    'TOKEN_REAUTH_MAX_RETRIES',
    'TOKEN_REAUTH_JITTER_MS',
    'MAX_CONCURRENCY',
    'ENABLE_NOOP',
    'NOOP_SLEEP_SECS',
  ])('%s is strict: blank and padded values are errors', (name) => {
    for (const text of ['', ' ', ' 1', '1 ']) expect(problem({ [name]: text })).toContain(` in ${name}`);
  });

  test.each([
    ['DMS_BASE_URL', 'dms.example.com', 'invalid URL in DMS_BASE_URL'],
    ['DMS_BASE_URL', 'ftp://dms', 'invalid URL in DMS_BASE_URL'],
    ['DDS_BASE_URL', 'http://', 'invalid URL in DDS_BASE_URL'],
    ['REQUEST_TIMEOUT_SECS', '1.5', 'invalid integer in REQUEST_TIMEOUT_SECS'],
    ['REQUEST_TIMEOUT_SECS', '-1', 'invalid integer in REQUEST_TIMEOUT_SECS'],
    ['REQUEST_TIMEOUT_SECS', '18446744073709551616', 'invalid integer in REQUEST_TIMEOUT_SECS'],
    ['POLL_BACKOFF_MS_MIN', '1e3', 'invalid integer in POLL_BACKOFF_MS_MIN'],
    ['CONTACT_GRACE_SECONDS', '1m', 'invalid integer in CONTACT_GRACE_SECONDS'],
    ['CONTACT_GRACE_SECONDS', '-1', 'invalid integer in CONTACT_GRACE_SECONDS'],
    ['CONTACT_GRACE_SECONDS', '4294967296', 'invalid integer in CONTACT_GRACE_SECONDS'],
    ['TOKEN_REAUTH_MAX_RETRIES', '4294967296', 'invalid integer in TOKEN_REAUTH_MAX_RETRIES'],
    ['MAX_CONCURRENCY', '-1', 'invalid integer in MAX_CONCURRENCY: must be a whole number from 0 to'],
    ['MAX_CONCURRENCY', '4294967296', 'invalid integer in MAX_CONCURRENCY'],
    ['RESOURCES', 'cpu=0', 'invalid amounts in RESOURCES: cpu must be a multiple of 0.001, above 0'],
    ['RESOURCES', '8 cores', 'invalid amounts in RESOURCES: must be a list such as cpu=8,memory=32GiB,gpu=1'],
    ['HEARTBEAT_MIN_RATIO', 'quarter', 'invalid float in HEARTBEAT_MIN_RATIO'],
    ['HEARTBEAT_MIN_RATIO', 'nan', 'invalid float in HEARTBEAT_MIN_RATIO'],
    ['HEARTBEAT_MAX_RATIO', 'inf', 'invalid float in HEARTBEAT_MAX_RATIO'],
    ['HEARTBEAT_MAX_RATIO', '1e999', 'invalid float in HEARTBEAT_MAX_RATIO'],
    ['TOKEN_SAFETY_RATIO', '0,75', 'invalid float in TOKEN_SAFETY_RATIO'],
    ['REGISTER_MAX_RETRY', '-2', 'REGISTER_MAX_RETRY must be -1 or a non-negative integer, got -2'],
    ['REGISTER_MAX_RETRY', '2147483648', 'invalid integer in REGISTER_MAX_RETRY'],
    ['REGISTER_MAX_RETRY', 'many', 'invalid integer in REGISTER_MAX_RETRY'],
    ['ENABLE_NOOP', 'True', 'invalid bool in ENABLE_NOOP; expected true/false'],
    ['ENABLE_NOOP', '1', 'invalid bool in ENABLE_NOOP; expected true/false'],
    ['CLIENT_ID', 'nöde', 'invalid text in CLIENT_ID'],
    [
      'LOG_LEVEL',
      'verbose',
      'invalid level in LOG_LEVEL: must be one of off, error, warn, info, debug, trace',
    ],
  ])('%s=%s is refused in words', (name, text, message) => {
    const line = problem({ [name]: text });
    expect(line.startsWith(`- ${message}`)).toBe(true);
    expect(line).toContain(text);
  });

  test.each([
    ['REQUEST_TIMEOUT_SECS', '18446744073709551615', 'requestTimeoutMs', Number.MAX_SAFE_INTEGER],
    ['REQUEST_TIMEOUT_SECS', '+5', 'requestTimeoutMs', 5_000],
    ['REQUEST_TIMEOUT_SECS', '0', 'requestTimeoutMs', 1_000],
    ['REGISTER_INTERVAL_SECS', '0', 'registerIntervalMs', 1_000],
    ['REGISTER_MAX_RETRY', '2147483647', 'registerMaxRetry', 2_147_483_647],
    ['TOKEN_REAUTH_MAX_RETRIES', '4294967295', 'tokenReauthMaxRetries', 4_294_967_295],
    ['TOKEN_REAUTH_MAX_RETRIES', '0', 'tokenReauthMaxRetries', 0],
    ['MAX_CONCURRENCY', '0', 'maxConcurrency', 1],
    ['MAX_CONCURRENCY', '4294967295', 'maxConcurrency', 4_294_967_295],
    ['TOKEN_SAFETY_RATIO', '-0.5', 'tokenSafetyRatio', 0],
    ['TOKEN_SAFETY_RATIO', '1.5', 'tokenSafetyRatio', 1],
    ['HEARTBEAT_MIN_RATIO', '-3', 'heartbeatMinRatio', -3],
    ['HEARTBEAT_MAX_RATIO', '3.', 'heartbeatMaxRatio', 3],
    ['POLL_BACKOFF_MS_MAX', '0', 'pollBackoffMaxMs', 0],
    ['LOG_FORMAT', 'xml', 'logFormat', 'json'],
    ['LOG_FORMAT', 'TEXT', 'logFormat', 'text'],
    ['DMS_BASE_URL', 'https://host/v1///', 'dmsBaseUrl', 'https://host/v1'],
    ['DMS_BASE_URL', 'HTTP://Host:80/', 'dmsBaseUrl', 'http://host'],
    ['DDS_BASE_URL', 'http://user:pass@host', 'ddsBaseUrl', 'http://host'],
  ] as const)('%s=%s is tolerated', (name, text, field, value) => {
    expect(config({ [name]: text })[field]).toBe(value);
  });

  test('bounds given the wrong way round are kept as they are', () => {
    expect(
      config({
        HEARTBEAT_MIN_RATIO: '0.9',
        HEARTBEAT_MAX_RATIO: '0.1',
        POLL_BACKOFF_MS_MIN: '9',
        POLL_BACKOFF_MS_MAX: '1',
      }),
    ).toMatchObject({
      heartbeatMinRatio: 0.9,
      heartbeatMaxRatio: 0.1,
      pollBackoffMinMs: 9,
      pollBackoffMaxMs: 1,
    });
  });

  test.each([
    [{ LOG_LEVEL: 'warn', RUST_LOG: 'debug' }, 'warn'],
    [{ RUST_LOG: 'debug' }, 'debug'],
    [{ LOG_LEVEL: ' ', RUST_LOG: 'error' }, 'error'],
    [{ LOG_LEVEL: 'info, DEBUG,hyper=warn' }, 'debug'],
    [{ LOG_LEVEL: 'trace' }, 'debug'],
    [{ LOG_LEVEL: 'off' }, 'off'],
    [{ RUST_LOG: 'hyper=warn' }, 'info'],
    [{ RUST_LOG: 'my_crate' }, 'info'],
  ])('%j logs from %s on', (env, level) => {
    expect(config(env).logLevel).toBe(level);
  });

  test('all problems are reported at once, one on a line, in a fixed order', () => {
    const env = { DMS_BASE_URL: 'x', ENABLE_NOOP: 'maybe', REG_SECRET: ' ', POLL_BACKOFF_MS_MIN: '' };
    expect(problems(env)).toEqual([
      '- invalid URL in DMS_BASE_URL: must be an absolute http:// or https:// URL, got "x"',
      '- REG_SECRET required for DDS SIWE authentication',
      '- SECP256K1_PRIVHEX required for DDS SIWE authentication',
      '- invalid integer in POLL_BACKOFF_MS_MIN: must be a whole number from 0 to 18446744073709551615, got ""',
      '- invalid bool in ENABLE_NOOP; expected true/false, got "maybe"',
    ]);
    try {
      parseNodeEnv(env);
    } catch (error) {
      expect(MillraceError.from(error).details['variables']).toEqual([
        'DMS_BASE_URL',
        'REG_SECRET',
        'SECP256K1_PRIVHEX',
        'POLL_BACKOFF_MS_MIN',
        'ENABLE_NOOP',
      ]);
    }
  });

  test('a key that cannot work is refused without being shown', () => {
    for (const key of [KEY.slice(1), `${KEY}00`, KEY.replace('4c', 'zz'), 'f'.repeat(64), '0'.repeat(64)]) {
      const line = problem({ SECP256K1_PRIVHEX: key });
      expect(line).toContain('SECP256K1_PRIVHEX');
      expect(line).not.toContain(key.slice(2, 20));
    }
  });

  test('a password in a URL that is refused, and the tail of a long value, are not shown', () => {
    expect(problem({ DMS_BASE_URL: 'ftp://me:hunter2@host/' })).not.toContain('hunter2');
    expect(problem({ NOOP_SLEEP_SECS: 'x'.repeat(5_000) }).length).toBeLessThan(300);
  });
});

describe('describeConfig', () => {
  test('every variable is listed once with its effective value and its source', () => {
    const entries = describeConfig({
      ...REQUIRED,
      REQUEST_TIMEOUT_SECS: '0',
      MAX_CONCURRENCY: '0',
      RESOURCES: 'memory=1GiB,cpu=4',
      RUST_LOG: 'debug',
      CLIENT_ID: ' ',
      http_proxy: 'http://user:pass@proxy:3128',
      HTTPS_PROXY: 'socks5://proxy',
    });
    expect(entries).toEqual([
      { name: 'DMS_BASE_URL', value: 'https://dms.auki.network/v1', source: null },
      { name: 'REQUEST_TIMEOUT_SECS', value: 1, source: 'REQUEST_TIMEOUT_SECS' },
      { name: 'NODE_VERSION', value: ENGINE_VERSION, source: null },
      { name: 'DDS_BASE_URL', value: 'https://dds.auki.network', source: null },
      { name: 'REG_SECRET', value: '<redacted>', source: 'REG_SECRET' },
      {
        name: 'SECP256K1_PRIVHEX',
        value: '<redacted> (wallet 0xfdbb6caf01414300c16ea14859fec7736d95355f)',
        source: 'SECP256K1_PRIVHEX',
      },
      { name: 'HEARTBEAT_JITTER_MS', value: 250, source: null },
      { name: 'HEARTBEAT_MIN_RATIO', value: 0.25, source: null },
      { name: 'HEARTBEAT_MAX_RATIO', value: 0.35, source: null },
      { name: 'POLL_BACKOFF_MS_MIN', value: 1_000, source: null },
      { name: 'POLL_BACKOFF_MS_MAX', value: 30_000, source: null },
      { name: 'TOKEN_SAFETY_RATIO', value: 0.75, source: null },
      { name: 'TOKEN_REAUTH_MAX_RETRIES', value: 3, source: null },
      { name: 'TOKEN_REAUTH_JITTER_MS', value: 500, source: null },
      { name: 'REGISTER_INTERVAL_SECS', value: 120, source: null },
      { name: 'REGISTER_MAX_RETRY', value: -1, source: null },
      { name: 'MAX_CONCURRENCY', value: 1, source: 'MAX_CONCURRENCY' },
      { name: 'RESOURCES', value: 'cpu=4,memory=1073741824', source: 'RESOURCES' },
      { name: 'LOG_FORMAT', value: 'json', source: null },
      { name: 'ENABLE_NOOP', value: false, source: null },
      { name: 'NOOP_SLEEP_SECS', value: 5, source: null },
      { name: 'CLIENT_ID', value: null, source: null },
      { name: 'LOG_LEVEL', value: 'debug', source: 'RUST_LOG' },
      { name: 'CONTACT_GRACE_SECONDS', value: 120, source: null },
      { name: 'HTTP_PROXY', value: 'http://<redacted>@proxy:3128', source: 'http_proxy' },
      { name: 'HTTPS_PROXY', value: null, source: 'HTTPS_PROXY' },
      { name: 'ALL_PROXY', value: null, source: null },
      { name: 'NO_PROXY', value: null, source: null },
    ]);
    expect(JSON.stringify(entries)).not.toContain(KEY.slice(0, 16));
    expect(JSON.stringify(entries)).not.toContain(SECRET.slice(0, 16));
  });

  test.each([
    ['v1.2.3', '1.2.3'],
    ['dev', ENGINE_VERSION],
  ])('the version shown for %s is the one that is registered', (configured, registered) => {
    expect(describeConfig({ ...REQUIRED, NODE_VERSION: configured })).toContainEqual({
      name: 'NODE_VERSION',
      value: registered,
      source: 'NODE_VERSION',
    });
  });

  test('an environment with problems is refused as when it is parsed', () => {
    expect(() => describeConfig({})).toThrow(/2 problems:\n- REG_SECRET required/);
  });

  test("the operators' table has every variable with its default", () => {
    const page = readFileSync(new URL('../../../docs/configuration.md', import.meta.url), 'utf8');
    const rows = new Map(
      page
        .split('\n')
        .filter((line) => line.startsWith('| `'))
        .map((line) => line.split('|').map((cell) => cell.trim().replaceAll('`', '')))
        .map((cells) => [cells[1], cells[2]]),
    );
    const inWords: Record<string, string> = {
      REG_SECRET: 'required',
      SECP256K1_PRIVHEX: 'required',
      NODE_VERSION: "the engine's version",
      CLIENT_ID: 'random',
      RESOURCES: 'none',
      HTTP_PROXY: 'none',
      HTTPS_PROXY: 'none',
      ALL_PROXY: 'none',
      NO_PROXY: 'none',
    };
    const expected = describeConfig(REQUIRED).map(({ name, value }) => [
      name,
      inWords[name] ?? String(value),
    ]);
    // Read by the command and not by the node.
    for (const name of ['MILLRACE_METRICS', 'MILLRACE_METRICS_BUCKETS', 'OTEL_EXPORTER_OTLP_ENDPOINT']) {
      rows.delete(name);
    }
    expect(Object.fromEntries(rows)).toEqual({ ...Object.fromEntries(expected), RUST_LOG: 'unset' });
  });
});
