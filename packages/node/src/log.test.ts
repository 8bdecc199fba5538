import { spawn } from 'node:child_process';
import { Writable } from 'node:stream';
import type { JsonObject, Logger } from '@millrace/runner';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { createLogger, type LoggerOptions } from './log.ts';

interface Captured {
  readonly log: Logger;
  readonly written: () => string;
  readonly lines: () => JsonObject[];
}

function capture(options: Partial<LoggerOptions> = {}): Captured {
  let text = '';
  const destination = new Writable({
    write(chunk: Buffer, _encoding, done) {
      text += chunk.toString('utf8');
      done();
    },
  });
  return {
    log: createLogger({ format: 'json', level: 'debug', destination, ...options }),
    written: () => text,
    lines: () =>
      text
        .split('\n')
        .slice(0, -1)
        .map((line) => JSON.parse(line) as JsonObject),
  };
}

describe('json', () => {
  test('a line is an object with level, time and msg around the fields, written before the call returns', () => {
    const { log, written, lines } = capture();
    log.info('task leased', { task_id: 't', attempt: 1, nested: { list: [1, 'a', null, true] } });
    expect(written().endsWith('}\n')).toBe(true);
    const [line] = lines();
    expect(line).toEqual({
      level: 'info',
      time: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/) as unknown,
      task_id: 't',
      attempt: 1,
      nested: { list: [1, 'a', null, true] },
      msg: 'task leased',
    });
  });

  test.each([
    ['debug', ['debug', 'info', 'warn', 'error']],
    ['info', ['info', 'warn', 'error']],
    ['warn', ['warn', 'error']],
    ['error', ['error']],
    ['off', []],
  ] as const)('level %s lets through %j', (level, expected) => {
    const { log, lines } = capture({ level });
    for (const each of ['debug', 'info', 'warn', 'error'] as const) log[each]('x');
    expect(lines().map((line) => line['level'])).toEqual(expected);
  });

  test("a child adds its fields to its lines and not to its parent's; a line's own fields win", () => {
    const { log, written, lines } = capture();
    const child = log.child({ task_id: 't', attempt: 1 }).child({ attempt: 2 });
    child.info('a', { step: 's' });
    child.info('b', { attempt: 3 });
    log.info('c');
    expect(lines().map(({ task_id, attempt, step }) => [task_id, attempt, step])).toEqual([
      ['t', 2, 's'],
      ['t', 3, undefined],
      [undefined, undefined, undefined],
    ]);
    expect(written().match(/"attempt"/g)).toHaveLength(2);
  });

  test("fields named like the line's own do not replace them", () => {
    const { log, lines } = capture();
    log.info('real', { msg: 'forged', level: 'error', time: 0 });
    expect(lines()[0]).toMatchObject({
      msg: 'real',
      level: 'info',
      msg_: 'forged',
      level_: 'error',
      time_: 0,
    });
  });
});

describe('text', () => {
  const strip = (text: string): string => text.replace(/^\S+Z /gm, '');

  test('a line is time, level, message and name=value, quoted where needed', () => {
    const { log, written } = capture({ format: 'text' });
    log.warn('lease lost', {
      task_id: 't',
      reason: 'no such lease',
      count: 2,
      ok: false,
      none: null,
      list: ['a b'],
    });
    expect(written()).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARN {2}lease lost /);
    expect(strip(written())).toBe(
      'WARN  lease lost task_id=t reason="no such lease" count=2 ok=false none=null list=["a b"]\n',
    );
  });

  test('text that looks like a field or a quote is quoted', () => {
    const { log, written } = capture({ format: 'text' });
    log.info('x', { a: 'b=c', q: 'say "hi"', e: '' });
    expect(strip(written())).toBe('INFO  x a="b=c" q="say \\"hi\\"" e=""\n');
  });
});

describe.each(['json', 'text'] as const)('safety of %s', (format) => {
  test('whatever is logged is one line without control characters', () => {
    fc.assert(
      fc.property(
        fc.string({ unit: 'binary', maxLength: 40 }),
        fc.dictionary(fc.string({ unit: 'binary', maxLength: 10 }), fc.jsonValue(), { maxKeys: 4 }),
        (message, fields) => {
          const { log, written } = capture({ format });
          log.info(message, fields as JsonObject);
          expect(written().endsWith('\n')).toBe(true);
          expect(written().slice(0, -1)).not.toMatch(/[\p{Cc}\u2028\u2029]/u);
        },
      ),
    );
  });

  test('what steers a terminal is escaped', () => {
    const { log, written } = capture({ format });
    const text = '\u001b[2J \u007f \u009b31m \u2028 \r\n';
    log.info(text, { text, [text]: 1 });
    expect(written()).not.toMatch(/[\p{Cc}\u2028](?!$)/u);
    expect(written()).toContain('\\u009b31m');
    expect(written().match(/\n/g)).toHaveLength(1);
  });

  test('fields whose names say secret are replaced at any depth, in any spelling', () => {
    const { log, written } = capture({ format });
    const names = [
      'access_token',
      'accessToken',
      'p2p_access_token',
      'Authorization',
      'signature',
      'registration_credentials',
      'registration_secret',
      'REG_SECRET',
      'SECP256K1_PRIVHEX',
      'privateKeyHex',
      'set-cookie',
      'password',
      'MILLRACE_TOKEN',
    ];
    for (const name of names) {
      log.info('a', { [name]: 'hidden1' });
      log.child({ deep: { list: [{ [name]: { inner: 'hidden2' } }] } }).info('b');
    }
    expect(written()).not.toContain('hidden');
    expect(written().match(/<redacted>/g)).toHaveLength(2 * names.length);
  });

  test('names that only resemble them are kept', () => {
    const { log, written } = capture({ format });
    log.info('a', { access_token_expires_at: 'kept1', tokens: 'kept2', signature_count: 'kept3' });
    for (const kept of ['kept1', 'kept2', 'kept3']) expect(written()).toContain(kept);
  });

  test('bearer tokens, JWTs and given secrets are replaced inside texts', () => {
    const key = 'ab'.repeat(32);
    const { log, written } = capture({ format, secrets: ['cred"entials==', `0x${key}`, ''] });
    const jwt = 'eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl';
    log.info(`sent Authorization: Bearer opaque-1 and ${jwt}`, {
      header: 'bearer opaque-2',
      body: `{"a":"${jwt}"}`,
      note: `cred"entials== and 0x${key} and ${key}`,
    });
    for (const hidden of ['opaque', 'eyJ', 'entials', 'abab']) expect(written()).not.toContain(hidden);
    expect(written()).toContain('sent Authorization: Bearer <redacted> and <redacted>');
  });

  test('a text of 8,192 bytes is kept and a longer one is cut', () => {
    const { log, written } = capture({ format });
    log.info('at', { text: 'x'.repeat(8_192) });
    expect(written()).toContain('x'.repeat(8_192));
    log.info('past', { text: 'y'.repeat(8_193) });
    expect(written()).not.toContain('y'.repeat(8_190));
    expect(written()).toContain('y…');
  });

  test('eight levels of nesting are kept and what is below them is not', () => {
    const nest = (levels: number): JsonObject => (levels === 0 ? { leaf: 1 } : { a: nest(levels - 1) });
    const { log, written } = capture({ format });
    log.info('at', { top: nest(7) });
    expect(written()).toContain('"leaf":1');
    log.info('past', { top: nest(8) });
    expect(written()).toContain('"a":"<too deep>"');
  });
});

describe('the default destination', () => {
  const program = (script: string): string[] => [
    '--input-type=module',
    '--eval',
    `import { createLogger } from ${JSON.stringify(new URL('./log.js', import.meta.url).href)};
     const log = createLogger({ format: 'json', level: 'info' });\n${script}`,
  ];

  test('it is standard error, complete even when the process ends at once', async () => {
    const child = spawn(
      process.execPath,
      program("for (let i = 0; i < 2000; i += 1) log.info('line', { i }); process.exit(0);"),
      { stdio: ['ignore', 'pipe', 'pipe'] },
    );
    let out = '';
    let error = '';
    child.stdout.on('data', (chunk) => (out += String(chunk)));
    child.stderr.on('data', (chunk) => (error += String(chunk)));
    await new Promise((resolve) => child.on('close', resolve));
    expect(out).toBe('');
    expect(error.split('\n')).toHaveLength(2_001);
    expect(JSON.parse(error.split('\n')[1_999]!)).toMatchObject({ i: 1_999, msg: 'line' });
  });

  test('a reader that goes away does not end the process', async () => {
    const child = spawn(
      process.execPath,
      program(`process.stdin.once('data', () => {
        for (let i = 0; i < 200; i += 1) log.info('nobody reads this');
        setTimeout(() => process.stdout.write('alive', () => process.exit(7)), 50);
      });
      process.stdout.write('ready');`),
      { stdio: ['pipe', 'pipe', 'pipe'] },
    );
    let out = '';
    child.stdout.on('data', (chunk) => {
      out += String(chunk);
      if (out !== 'ready') return;
      child.stderr.destroy();
      child.stderr.on('close', () => child.stdin.write('go'));
    });
    const code = await new Promise((resolve) => child.on('exit', resolve));
    expect([out, code]).toEqual(['readyalive', 7]);
  });
});
