/** Usage and errors of the program, without the process around it. */
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ask, makePlace, type Place } from './program.test.support.ts';

let place: Place;
beforeAll(async () => {
  place = await makePlace();
  await write('here.mjs', 'export default {};');
  await write('here.yaml', 'tasks: [{ capability: /x/v1 }]');
});
afterAll(() => place[Symbol.asyncDispose]());

const write = (name: string, text: string): Promise<void> => writeFile(path.join(place.cwd, name), text);
const json = (text: string): unknown => {
  expect(text.trimEnd().split('\n')).toHaveLength(1);
  return JSON.parse(text);
};

describe('usage', () => {
  test('help lists the commands and exits 0', async () => {
    const { code, stdout, stderr } = await ask(['--help'], place);
    expect([code, stderr]).toEqual([0, '']);
    for (const name of ['up', 'run', 'submit', 'jobs', 'job', 'get', 'nodes', 'node', 'dispatch', 'doctor']) {
      expect(stdout).toMatch(new RegExp(`^  ${name} `, 'm'));
    }
  });

  test.each([
    'up',
    'run',
    'submit',
    'jobs',
    'job show',
    'job watch',
    'job logs',
    'job explain',
    'job cancel',
    'get',
    'nodes',
    'nodes add',
    'node start',
    'dispatch serve',
    'doctor',
  ])('help of "%s" has an example', async (command) => {
    const { code, stdout } = await ask([...command.split(' '), '--help'], place);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^Examples:\n {2}\$ .*millrace/m);
    expect(stdout).toContain('--json');
  });

  test.each([
    [['jobs', '--bogus'], /unknown option '--bogus'; see millrace jobs --help/],
    [['jobs', 'extra'], /too many arguments/],
    [['frobnicate'], /unknown command 'frobnicate'/],
    [['job'], /no command given; see millrace job --help/],
    [['run'], /missing required argument/],
    [['run', 'photo.jpg'], /neither a runner module .* nor a job file/],
    [['run', 'none.ts'], /runner module .*none\.ts cannot be read/],
    [['run', 'here.mjs', '--input', 'none.jpg'], /cannot read the input .*none\.jpg/],
    [['run', 'here.mjs', '--input', '-', '--input', '-'], /stdin \(-\) can be only one input/],
    [['run', 'here.mjs', '--meta', '{size: 1}'], /--meta is not JSON/],
    [['run', 'here.mjs', '--meta', '@none.json'], /--meta: cannot read .*none\.json/],
    [['run', 'here.mjs', '--timeout', 'soon'], /--timeout must be a duration/],
    [['run', 'here.mjs', '--runner', 'here.mjs'], /--runner belongs to a job file/],
    [['run', 'here.yaml'], /nothing here can run here\.yaml: name runner modules with --runner/],
    [['run', 'here.yaml', '--label', 'x'], /--meta and --label belong to a runner module/],
    [['jobs', '--limit', '0'], /--limit must be an integer from 1 to 1000, got "0"/],
    [['jobs', '--status', 'done'], /--status must be one of pending, .*, got "done"/],
    [['up', '--port', '70000'], /--port must be an integer from 0 to 65535, got "70000"/],
    [
      ['dispatch', 'serve', '--store', 'postgres://me:secret@:99999999/x'],
      /the store must be postgres:\/\/USER(?!.*secret)/,
    ],
    [['dispatch', 'serve', '--store', 'postgres://db'], /the URL of the store names no database/],
    [
      ['dispatch', 'serve', '--blobs', 's3://key:secret@bucket'],
      /the URL of the blobs must not hold credentials(?!.*secret)/,
    ],
    [
      ['dispatch', 'serve', '--blobs', 's3://bucket?acl=x'],
      /the URL of the blobs has the unknown parameter "acl"/,
    ],
    [
      ['up', '--blobs', 's3://key:secret@bucket'],
      /the URL of the blobs must not hold credentials(?!.*secret)/,
    ],
    [['up', '--blobs', 'gs://bucket'], /--blobs must be file:DIR or s3:\/\/BUCKET…, got "gs:\/\/bucket"/],
    [
      ['dispatch', 'serve', '--blobs', 'gs://bucket'],
      /--blobs must be file:DIR or s3:\/\/BUCKET…, got "gs:\/\/bucket"/,
    ],
    [['dispatch', 'serve', '--store', 'mysql://u:secret@x'], /got "mysql:\/\/…@x"/],
    [
      ['dispatch', 'serve', '--store', 'mysql:x'],
      /--store must be sqlite:PATH or postgres:\/\/…, got "mysql:x"/,
    ],
    [['nodes', 'add', '--name', 'x', '--mode', 'secret'], /--mode must be public or dedicated, got "secret"/],
    [['submit', 'none.yaml'], /cannot read the job file none\.yaml/],
    [['node', 'start', '--callbacks', 'a:b:c'], /--callbacks must be PORT or HOST:PORT, got "a:b:c"/],
    [['node', 'start', '--callbacks', '70000'], /--callbacks port must be an integer from 0 to 65535/],
    [['node', 'start', '--repeat-registration-secs', 'x'], /--repeat-registration-secs must be an integer/],
  ])('%j is wrong usage: one line on stderr, exit code 2', async (args, message) => {
    const { code, stdout, stderr } = await ask(args, place);
    expect([code, stdout]).toEqual([2, '']);
    expect(stderr).toMatch(message);
    expect(stderr.trimEnd().split('\n').at(-1)).toMatch(/^millrace: /);
    expect(stderr).not.toMatch(/^\s+at /m);
  });

  test('what is wrong with the environment of a node is said all at once, a problem to a line', async () => {
    const { code, stderr } = await ask(['node', 'start'], place);
    expect(code).toBe(2);
    expect(stderr.trimEnd().split('\n')).toEqual([
      "millrace: the node's environment has 2 problems:",
      expect.stringMatching(/^ +- REG_SECRET required/),
      expect.stringMatching(/^ +- SECP256K1_PRIVHEX required/),
      expect.stringMatching(
        /^ +"millrace nodes add" makes credentials; give them with --env-file or in the environment$/,
      ),
    ]);
  });

  test('the settings of a node are shown with which file, or the environment, had the last word', async () => {
    await write('millrace.config.json', '{"maxConcurrency":3}');
    await write(
      'node.env',
      `REG_SECRET=c2VjcmV0\nSECP256K1_PRIVHEX=${'01'.repeat(32)}\nNOOP_SLEEP_SECS=7\nCLIENT_ID=x\n`,
    );
    const { code, stdout } = await ask(
      ['node', 'start', '--env-file', 'node.env', '--print-config', '--json'],
      place,
      { env: { CLIENT_ID: 'me', RUST_LOG: 'debug' } },
    );
    expect(code).toBe(0);
    const { config } = json(stdout) as { config: { name: string }[] };
    const shown = (name: string): unknown => config.find((entry) => entry.name === name);
    expect(shown('MAX_CONCURRENCY')).toMatchObject({
      value: 3,
      from: expect.stringMatching(/millrace\.config\.json$/),
    });
    expect(shown('REG_SECRET')).toMatchObject({ value: '<redacted>', from: 'node.env' });
    expect(shown('NOOP_SLEEP_SECS')).toMatchObject({ value: 7, from: 'node.env' });
    expect(shown('CLIENT_ID')).toMatchObject({ value: 'me', from: 'environment' });
    expect(shown('LOG_LEVEL')).toMatchObject({ value: 'debug', source: 'RUST_LOG', from: 'environment' });
    expect(shown('ENABLE_NOOP')).toMatchObject({ value: false, from: 'default' });
    expect(stdout).not.toContain('c2VjcmV0');
    expect(stdout).not.toContain('0101');
  });

  test('a store that cannot be reached is exit code 4, and its password is not repeated', async () => {
    const url = 'postgres://me:secret@127.0.0.1:1/jobs';
    for (const [args, env] of [
      [['--store', url], {}],
      [[], { MILLRACE_STORE: url }],
    ] as const) {
      const { code, stderr } = await ask(['dispatch', 'serve', '--port', '0', ...args], place, { env });
      expect(code).toBe(4);
      expect(stderr).toMatch(/"jobs" at 127\.0\.0\.1:1 \(user me\) cannot be reached/);
      expect(stderr).not.toContain('secret');
    }
  });

  test('with --json an error is a document on stdout', async () => {
    const { code, stdout } = await ask(['jobs', '--bogus', '--json'], place);
    expect(code).toBe(2);
    expect(json(stdout)).toEqual({
      error: { code: 'invalid_argument', message: "unknown option '--bogus'; see millrace jobs --help" },
    });
  });

  test('a bad job file is refused with its line, before any dispatcher is looked for', async () => {
    await write('job.yaml', 'label: x\ntasks:\n  - capability: /x/v1\n    priority: high\n');
    const { code, stderr } = await ask(['submit', 'job.yaml'], place);
    expect(code).toBe(2);
    expect(stderr).toMatch(/^millrace: job\.yaml:4:15: tasks\[0\]\.priority: .*got "high"\n$/);
  });

  test('stack traces are for MILLRACE_DEBUG', async () => {
    const { stderr } = await ask(['submit', 'none.yaml'], place, { env: { MILLRACE_DEBUG: '1' } });
    expect(stderr).toMatch(/^\s+at /m);
  });
});

describe('without a dispatcher', () => {
  test('commands exit 4 and say how to start one', async () => {
    const { code, stderr } = await ask(['jobs'], place);
    expect(code).toBe(4);
    expect(stderr).toMatch(
      /no dispatcher is running on .*home\/\.local\/share\/millrace; start one with "millrace up"/,
    );
  });

  test('a named one that does not answer is exit code 4 as well', async () => {
    // Port 9 of loopback: nothing listens there on a machine that runs tests.
    const { code, stdout } = await ask(
      ['jobs', '--url', 'http://127.0.0.1:9', '--token', 'x', '--json'],
      place,
    );
    expect(code).toBe(4);
    expect(json(stdout)).toMatchObject({
      error: {
        code: 'unavailable',
        message: expect.stringMatching(/cannot reach the dispatcher at http:\/\/127\.0\.0\.1:9/),
      },
    });
  });
});
