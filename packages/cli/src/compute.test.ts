/** Computes as their users have them: real processes, real files, a real dispatcher. */
import { createHash } from 'node:crypto';
import { cp, mkdir, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Program, answer, ask, makePlace, millrace, type Place } from './program.test.support.ts';

let place: Place;
beforeEach(async () => {
  place = await makePlace();
});
afterEach(() => place[Symbol.asyncDispose]());

const write = async (name: string, text: string | Uint8Array): Promise<void> => {
  const file = path.join(place.cwd, name);
  await mkdir(path.dirname(file), { recursive: true });
  await writeFile(file, text);
};
const read = (name: string): Promise<string> => readFile(path.join(place.cwd, name), 'utf8');
// eslint-disable-next-line typescript/no-explicit-any -- tests look into it with toEqual
const json = (text: string): any => {
  expect(text.trimEnd().split('\n')).toHaveLength(1);
  return JSON.parse(text);
};
const dataDir = (): string => path.join(place.home, '.local/share/millrace');

const SUM = `import { add } from './lib/add.ts';
interface Input { readonly numbers?: readonly number[] }
export default function sum({ numbers = [] }: Input): { sum: number; at: number } {
  console.log('adding', numbers.length);
  if (numbers.length === 0) throw new RangeError('nothing to add');
  return { sum: numbers.reduce(add), at: Date.now() };
}
`;
const ADD = 'export const add = (a: number, b: number): number => a + b;\n';

/** A WASI command without memory that does nothing: (module (func (export "_start"))). */
const NOTHING = Buffer.from([
  0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 4, 1, 0x60, 0, 0, 3, 2, 1, 0, 7, 10, 1, 6, 0x5f, 0x73, 0x74, 0x61, 0x72,
  0x74, 0, 0, 10, 4, 1, 2, 0, 0x0b,
]);
/** (module (import "env" "x" (func)) (func (export "_start"))) */
const ALIEN = Buffer.from([
  0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 4, 1, 0x60, 0, 0, 2, 9, 1, 3, 0x65, 0x6e, 0x76, 1, 0x78, 0, 0, 3, 2, 1,
  0, 7, 10, 1, 6, 0x5f, 0x73, 0x74, 0x61, 0x72, 0x74, 0, 1, 10, 4, 1, 2, 0, 0x0b,
]);
/** (module (memory 1000) (func (export "_start"))): 62.5 MiB */
const BIG = Buffer.from([
  0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 4, 1, 0x60, 0, 0, 3, 2, 1, 0, 5, 4, 1, 0, 0xe8, 7, 7, 10, 1, 6, 0x5f,
  0x73, 0x74, 0x61, 0x72, 0x74, 0, 0, 10, 4, 1, 2, 0, 0x0b,
]);
const digestOf = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

async function writeSum(folder = ''): Promise<void> {
  await write(path.join(folder, 'sum.ts'), SUM);
  await write(path.join(folder, 'lib/add.ts'), ADD);
}

describe('millrace compute build', () => {
  test('prints a ref that is the same wherever it is built, and keeps artifact, manifest and sources', async () => {
    await writeSum();
    await writeSum('elsewhere/deep');
    const ref = (await answer(['compute', 'build', 'sum.ts'], place)).trim();
    expect(ref).toMatch(/^compute:\/\/sha256\/[0-9a-f]{64}$/);
    const again = ['compute', 'build', 'elsewhere/deep/sum.ts', '--data', 'other', '--json'];
    const built = json(await answer(again, place));
    expect(built).toEqual({
      ref,
      engine: 'quickjs',
      bytes: expect.any(Number),
      data: path.join(place.cwd, 'other'),
    });
    const artifact = path.join(dataDir(), 'computes/sha256', ref.slice('compute://sha256/'.length));
    const bytes = await readFile(artifact);
    expect(digestOf(bytes)).toBe(path.basename(artifact));
    expect(bytes.length).toBe(built.bytes);
    expect(json(await readFile(`${artifact}.manifest.json`, 'utf8'))).toMatchObject({ engine: 'quickjs' });
    expect(JSON.parse(await readFile(`${artifact}.source.json`, 'utf8'))).toEqual({
      v: 1,
      entry: 'sum.ts',
      files: [
        { path: 'lib/add.ts', content: ADD },
        { path: 'sum.ts', content: SUM },
      ],
    });
    expect((await stat(dataDir())).mode & 0o777).toBe(0o700);
  });

  test('takes a WASI command as it is, and says where a source is wrong', async () => {
    await write('nothing.wasm', NOTHING);
    expect(await answer(['compute', 'build', 'nothing.wasm'], place)).toBe(
      `compute://sha256/${digestOf(NOTHING)}\n`,
    );
    await write('broken.ts', 'export default (: number) => 1;\n');
    const broken = await ask(['compute', 'build', 'broken.ts'], place);
    expect([broken.code, broken.stdout]).toEqual([2, '']);
    expect(broken.stderr).toMatch(/broken\.ts:1:\d+: /);
    await write('cut.wasm', NOTHING.subarray(0, 20));
    for (const file of ['cut.wasm', 'absent.ts', 'notes.txt', `compute://sha256/${digestOf(NOTHING)}`]) {
      expect((await ask(['compute', 'build', file], place)).code).toBe(2);
    }
  });
});

describe('millrace compute run', () => {
  test('gives the output on stdout, diagnostics and measurements on stderr', async () => {
    await writeSum();
    await write('in.json', '{"numbers":[1,2]}');
    for (const [input, stdin] of [
      ['{"numbers":[1,2]}', ''],
      ['in.json', ''],
      ['@in.json', ''],
      ['-', '{"numbers":[1,2]}'],
    ] as const) {
      const run = ['compute', 'run', 'sum.ts', '--input', input, '--now', '1970-01-01T00:00:05Z'];
      const { code, stdout, stderr } = await ask(run, place, { stdin });
      expect([code, stdout]).toEqual([0, '{"sum":3,"at":5000}\n']);
      expect(stderr).toMatch(
        /^\[info\] adding 2\nok · [\d.]+ ms · .* · memory 6\.0 MiB · in 17 B · out 19 B\n$/,
      );
    }
  });

  test('with --json it is one document; fuel is the same each time', async () => {
    await writeSum();
    const ref = (await answer(['compute', 'build', 'sum.ts'], place)).trim();
    const run = [
      'compute',
      'run',
      ref,
      '--input',
      '{"numbers":[7]}',
      '--now',
      '7',
      '--fuel',
      '1000000000',
      '--json',
    ];
    const [one, two] = [json(await answer(run, place)), json(await answer(run, place))];
    expect(one).toMatchObject({
      ref,
      engine: 'quickjs',
      output: { sum: 7, at: 7 },
      metrics: { status: 'ok', reason: null, fuelUsed: expect.any(Number) },
    });
    expect(one.metrics.fuelUsed).toBeGreaterThan(1000);
    expect(two.metrics.fuelUsed).toBe(one.metrics.fuelUsed);
    const short = await ask(
      [...run.slice(0, 7), '--fuel', String(one.metrics.fuelUsed - 1), '--json'],
      place,
    );
    expect([short.code, json(short.stdout).error.reason]).toEqual([1, 'out-of-fuel']);
  });

  test('a compute that fails is exit code 1, told in terms of its sources', async () => {
    await writeSum();
    const ref = (await answer(['compute', 'build', 'sum.ts'], place)).trim();
    const failed = await ask(['compute', 'run', ref, '--input', '{}'], place);
    expect([failed.code, failed.stdout]).toEqual([1, '']);
    expect(failed.stderr).toMatch(/^millrace: the compute failed: RangeError: nothing to add$/m);
    expect(failed.stderr).toMatch(/at sum \(sum\.ts:5:\d+\)/);
    expect(failed.stderr).toMatch(/^trap · /m);
    const document = await ask(['compute', 'run', ref, '--json'], place);
    expect([document.code, json(document.stdout)]).toMatchObject([
      1,
      {
        ref,
        error: { reason: 'trap', message: expect.stringContaining('sum.ts:5:') },
        metrics: { status: 'trapped' },
      },
    ]);
  });

  test('limits are kept: wall time, memory and output', async () => {
    await write('loop.js', 'export default () => { for (;;); };\n');
    const late = await ask(['compute', 'run', 'loop.js', '--max-wall', '50ms', '--json'], place);
    expect([late.code, json(late.stdout)]).toMatchObject([
      1,
      { error: { code: 'deadline_exceeded', reason: 'wall-limit' }, metrics: { status: 'wall-limit' } },
    ]);
    await write('big.js', "export default () => 'x'.repeat(98);\n");
    const run = ['compute', 'run', 'big.js', '--json', '--max-output'];
    expect((await ask([...run, '100'], place)).code).toBe(0);
    expect(json((await ask([...run, '99'], place)).stdout).error.reason).toBe('output-limit');
    await write('big.wasm', BIG);
    const built = await ask(['compute', 'build', 'big.wasm'], place);
    expect([built.code, built.stdout]).toEqual([0, `compute://sha256/${digestOf(BIG)}\n`]);
    expect(built.stderr).toMatch(/more than the default limits.*62.*maxMemoryMb 32/);
    const hungry = await ask(['compute', 'run', 'big.wasm'], place);
    expect([hungry.code, hungry.stderr]).toEqual([
      2,
      expect.stringContaining('over maxMemoryMb 32; --max-memory allows more'),
    ]);
    expect(await answer(['compute', 'run', 'big.wasm', '--max-memory', '64'], place)).toBe('{}\n');
    const small = await ask(['compute', 'run', 'big.js', '--max-memory', '5'], place);
    expect(small.code).not.toBe(0);
    await write('slow.js', 'for (;;) {}\nexport default () => 1;\n');
    const slow = await ask(['compute', 'run', 'slow.js', '--max-prepare', '200ms'], place);
    expect([slow.code, slow.stderr]).toEqual([1, expect.stringContaining('maxPrepareMs 200')]);
    await writeSum();
    const exact = ['compute', 'run', 'sum.ts', '--input', '{"numbers":[7]}', '--max-input', '15'];
    expect((await ask(exact, place)).code).toBe(0);
  });

  test('what is asked wrongly is exit code 2, before anything runs', async () => {
    await writeSum();
    await write('cut.json', '[1,2');
    for (const [stdin, said] of [
      ['{"numbers":', /stdin is not one JSON document: cut short after 11 bytes/],
      ['[1] [2]', /stdin is not one JSON document/],
      [' '.repeat(4 * 1024 * 1024 + 1), /stdin has more than 4194304 bytes; --max-input allows more/],
    ] as const) {
      const { code, stdout, stderr } = await ask(['compute', 'run', 'sum.ts', '--input', '-'], place, {
        stdin,
      });
      expect([code, stdout]).toEqual([2, '']);
      expect(stderr).toMatch(said);
    }
    for (const [args, said] of [
      [['--now', 'yesterday'], /--now must be RFC 3339/],
      [['--fuel', '-1'], /--fuel must be an integer from 0/],
      [['--max-memory', '0'], /--max-memory must be an integer from 1 to 4096/],
      [['--input', 'nowhere.json'], /is not JSON and cannot be read as a file/],
      [['--input', 'cut.json'], /cut\.json is not one JSON document: cut short after 4 bytes/],
      [
        ['--input', '[1,2]', '--max-input', '4'],
        /the JSON given has more than 4 bytes; --max-input allows more/,
      ],
      [['--input', 'cut.json', '--max-input', '3'], /cut\.json has more than 3 bytes/],
    ] as const) {
      const { code, stdout, stderr } = await ask(['compute', 'run', 'sum.ts', ...args], place);
      expect([code, stdout]).toEqual([2, '']);
      expect(stderr).toMatch(said);
    }
    const absent = await ask(['compute', 'run', `compute://sha256/${'0'.repeat(64)}`], place);
    expect([absent.code, absent.stderr]).toEqual([
      2,
      expect.stringMatching(/is not in .*computes; build it here/),
    ]);
    expect((await ask(['compute', 'run', 'compute://sha256/abc'], place)).code).toBe(2);
    expect((await ask(['compute', 'run', 'op://sum'], place)).code).toBe(2);
  });

  test('an artifact that was changed on disk is not run', async () => {
    await writeSum();
    const ref = (await answer(['compute', 'build', 'sum.ts'], place)).trim();
    const file = path.join(dataDir(), 'computes/sha256', ref.slice('compute://sha256/'.length));
    await writeFile(file, 'export default () => "evil";\n');
    const { code, stdout, stderr } = await ask(['compute', 'run', ref], place);
    expect([code, stdout]).toEqual([1, '']);
    expect(stderr).toContain('they were changed or cut');
  });
});

/**
 * (module (import wasi fd_write) (memory (export "memory") 1) (func (export "invoke") …writes {"from":"plugin"}…)
 * (func (export "initialize-runtime"))), with the custom section import_namespace "javy-test-plugin-v1".
 */
const PLUGIN = Buffer.from(
  'AGFzbQEAAAABDAJgBH9/f38Bf2AAAAIjARZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxCGZkX3dyaXRlAAADAwIBAQUDAQABBygDBm1lbW9yeQIABmludm9rZQABEmluaXRpYWxpemUtcnVudGltZQACCiACGwBBAEEQNgIAQQRBETYCAEEBQQBBAUEIEAAaCwIACwsXAQBBEAsReyJmcm9tIjoicGx1Z2luIn0AJBBpbXBvcnRfbmFtZXNwYWNlamF2eS10ZXN0LXBsdWdpbi12MQ==',
  'base64',
);
/** (module (import "javy-test-plugin-v1" "invoke" (func $i)) (func (export "_start") call $i)) */
const LINKED = Buffer.from(
  'AGFzbQEAAAABBAFgAAACHgETamF2eS10ZXN0LXBsdWdpbi12MQZpbnZva2UAAAMCAQAHCgEGX3N0YXJ0AAEKBgEEABAACw==',
  'base64',
);

describe('computes that are linked to a plugin', () => {
  test('run by hand with the file, and on a node whose config pins it', async () => {
    await write('plugin.wasm', PLUGIN);
    await write('linked.wasm', LINKED);
    expect(await answer(['compute', 'inspect', 'linked.wasm'], place)).toMatch(
      /^linked to +javy-test-plugin-v1$/m,
    );
    const ran = await ask(['compute', 'run', 'linked.wasm', '--plugin', 'plugin.wasm'], place);
    expect([ran.code, ran.stdout]).toEqual([0, '{"from":"plugin"}\n']);
    const without = await ask(['compute', 'run', 'linked.wasm'], place);
    expect([without.code, without.stderr]).toEqual([2, expect.stringContaining('javy-test-plugin-v1')]);
    expect((await ask(['compute', 'run', 'linked.wasm', '--plugin', 'no.wasm'], place)).code).toBe(2);

    await write('job.yaml', 'tasks: [{ capability: /compute/v1, meta: { ref: op://linked } }]\n');
    const config = (digest: string): Promise<void> =>
      write('conf/millrace.yaml', `compute: { plugins: [{ file: ../plugin.wasm, digest: '${digest}' }] }\n`);
    const run = ['run', 'job.yaml', '--config', 'conf/millrace.yaml'];
    await config('0'.repeat(64));
    const refused = await millrace(run, place);
    expect([refused.code, refused.stderr]).toEqual([
      2,
      expect.stringContaining(`has the sha256 ${digestOf(PLUGIN)}`),
    ]);
    await config(digestOf(PLUGIN));
    expect((await millrace(run, place)).code).toBe(0);
    expect(await read('out/output.json')).toBe('{"from":"plugin"}');
  });
});

describe('millrace compute inspect', () => {
  test('tells what a compute asks for and whether it would be run', async () => {
    await writeSum();
    await write('nothing.wasm', NOTHING);
    const wasm = await answer(['compute', 'inspect', 'nothing.wasm'], place);
    expect(wasm).toMatch(/^engine +wasm$/m);
    expect(wasm).toMatch(/^size +36 B \(36 bytes\)$/m);
    expect(wasm).toMatch(/^memory +none of its own$/m);
    expect(wasm).toMatch(/^export +function _start \(\) -> \(\)$/m);
    expect(wasm).toMatch(/^runs +yes$/m);
    await write('alien.wasm', ALIEN);
    const alien = await answer(['compute', 'inspect', 'alien.wasm'], place);
    expect(alien).toMatch(/^import +function env\.x \(\) -> \(\)$/m);
    expect(alien).toMatch(/^runs +no: module refused: it imports the function "env" "x"/m);
    await write('cut.wasm', NOTHING.subarray(0, 20));
    const cut = await ask(['compute', 'inspect', 'cut.wasm'], place);
    expect([cut.code, cut.stderr]).toEqual([
      2,
      expect.stringMatching(/cut\.wasm: module refused: cut short/),
    ]);
    expect(json(await answer(['compute', 'inspect', 'sum.ts', '--json'], place))).toMatchObject({
      engine: 'quickjs',
      exports: ['default'],
      refusal: null,
    });
  });
});

describe('computes and a dispatcher', () => {
  test('are pushed, run and inspected from another folder, and pushed again at no cost', async () => {
    await writeSum();
    await using up = new Program(['up', '--port', '0', '--json', '--data', 'state'], place);
    expect(await up.firstDocument()).toMatchObject({ capabilities: ['/compute/v1'] });
    const here = ['--data', 'state'];
    const pushed = json(await answer(['compute', 'push', 'sum.ts', '--json', ...here], place));
    expect(pushed).toMatchObject({ engine: 'quickjs', sent: true });
    expect(json(await answer(['compute', 'push', pushed.ref, '--json', ...here], place)).sent).toBe(false);
    await rm(path.join(place.cwd, 'state/computes'), { recursive: true });
    const ran = await ask(['compute', 'run', pushed.ref, '--input', '{"numbers":[4]}', ...here], place);
    expect([ran.code, ran.stdout]).toEqual([0, expect.stringMatching(/^\{"sum":4,/)]);
    expect((await ask(['compute', 'inspect', pushed.ref, ...here], place)).code).toBe(0);
    const unknown = `compute://sha256/${'0'.repeat(64)}`;
    const none = await ask(['compute', 'run', unknown, ...here], place);
    expect([none.code, none.stderr]).toEqual([
      2,
      expect.stringMatching(
        new RegExp(`${unknown} is neither in .*computes nor at http://127.*compute push`),
      ),
    ]);
    expect((await ask(['compute', 'push', unknown, ...here], place)).code).toBe(2);
    expect((await ask(['compute', 'push', 'sum.ts', '--data', 'nowhere'], place)).code).toBe(4);
  });

  test('the example is done by one command, and its job file by submit', async () => {
    const example = fileURLToPath(new URL('../../../examples/compute/', import.meta.url));
    const ran = await millrace(['run', path.join(example, 'job.yaml'), '--out', 'out', '--json'], place);
    expect([ran.code, json(ran.stdout)]).toMatchObject([0, { status: 'completed' }]);
    const report = JSON.parse(await read('out/report/output.json'));
    expect(report).toEqual({
      title: 'garden, as of 2026-04-04',
      lines: [
        '2026-04-01    5.7 °C  10.8 °C  15.9 °C',
        '2026-04-02    6.4 °C  11.5 °C  16.6 °C',
        '2026-04-03    7.1 °C  13.7 °C  19.1 °C',
      ],
    });
    await cp(example, path.join(place.cwd, 'weather'), { recursive: true });
    await using up = new Program(['up', '--port', '0', '--json'], place);
    await up.firstDocument();
    const submit = ['submit', 'weather/job.yaml', '--watch', '--json'];
    const done = json(await answer(submit, place));
    expect(done).toMatchObject({ status: 'completed' });
    // It asks for that: a second time nothing is done, and each task says whose result it has.
    const again = json(await answer(submit, place));
    expect(again).toMatchObject({ status: 'completed' });
    const [first, second] = await Promise.all(
      [done, again].map(async ({ job_id: id }) => json(await answer(['job', 'show', id, '--json'], place))),
    );
    const madeBy = second.receipts.map(
      (receipt: { meta: { memo: { task_id: string } } }) => receipt.meta.memo.task_id,
    );
    expect(madeBy.toSorted()).toEqual(first.tasks.map((task: { id: string }) => task.id).toSorted());
    expect(await answer(['job', 'show', again.job_id], place)).toContain(
      `as task ${first.tasks[0].id} of job ${done.job_id}`,
    );
    await answer(['get', again.job_id, '--out', 'second'], place);
    expect(JSON.parse(await read('second/report/output.json'))).toEqual(report);
    await answer(['get', done.job_id, 'report/*', '--out', 'got'], place);
    expect(JSON.parse(await read('got/report/output.json'))).toEqual(report);
    // Three computes were fetched, each once, and what is kept is what was named.
    const cache = path.join(dataDir(), 'compute-cache/computes/sha256');
    const names = (await readdir(cache)).filter((name) => /^[0-9a-f]{64}$/.test(name));
    expect(names).toHaveLength(3);
    for (const name of names) expect(digestOf(await readFile(path.join(cache, name)))).toBe(name);
  });

  test('a name without a file and a source that is wrong are found before any dispatcher is', async () => {
    await writeSum();
    const job = (ref: string): string => `tasks: [{ capability: /compute/v1, meta: { ref: '${ref}' } }]\n`;
    await write('absent.yaml', job('op://absent'));
    await write('folder.yaml', job('op://lib/add'));
    await write('broken.ts', 'export default (: number) => 1;\n');
    await write('broken.yaml', job('op://broken'));
    for (const [file, said] of [
      ['absent.yaml', /op:\/\/absent is not there: put absent\.wasm, absent\.ts/],
      ['folder.yaml', /"op:\/\/lib\/add" names no compute/],
      ['broken.yaml', /broken\.ts:1:\d+: /],
    ] as const) {
      for (const command of ['submit', 'run']) {
        const { code, stdout, stderr } = await ask([command, file], place);
        expect([command, code, stdout]).toEqual([command, 2, '']);
        expect(stderr).toMatch(said);
      }
    }
  });

  test('a ref in a job is stored from the data folder when only that has it; else the job is refused', async () => {
    await writeSum();
    const ref = (await answer(['compute', 'build', 'sum.ts'], place)).trim();
    const meta = (name: string) => `{ ref: '${name}', input: { numbers: [20, 22] }, now: 0 }`;
    await write('known.yaml', `tasks: [{ capability: /compute/v1, meta: ${meta(ref)} }]\n`);
    const unknown = `compute://sha256/${'f'.repeat(64)}`;
    await write('unknown.yaml', `tasks: [{ capability: /compute/v1, meta: ${meta(unknown)} }]\n`);
    const ran = await millrace(['run', 'known.yaml', '--json'], place);
    expect(ran.code).toBe(0);
    expect(await read('out/output.json')).toBe('{"sum":42,"at":0}');
    await using up = new Program(['up', '--port', '0', '--json'], place);
    await up.firstDocument();
    const refused = await ask(['submit', 'unknown.yaml'], place);
    expect([refused.code, refused.stdout]).toEqual([2, '']);
    expect(refused.stderr).toContain(`names a compute that is not stored here: ${unknown}`);
    expect(json(await answer(['jobs', '--json'], place)).jobs).toEqual([]);
    expect(json(await answer(['submit', 'known.yaml', '--watch', '--json'], place)).status).toBe('completed');
  });

  test('a node elsewhere runs computes when its config says so, with its own limits', async () => {
    await write('loop.js', 'export default () => { for (;;); };\n');
    await writeSum();
    await write(
      'job.yaml',
      `tasks:
  - { label: ends, capability: /compute/v1, outputs_prefix: a, meta: { ref: op://sum, input: { numbers: [1] }, now: 0 } }
  - { label: does not, capability: /compute/v1, max_attempts: 1, meta: { ref: op://loop } }
`,
    );
    await using dispatcher = new Program(['dispatch', 'serve', '--port', '0', '--data', 'state'], place);
    const { url } = await dispatcher.firstDocument<{ url: string }>();
    const env = { MILLRACE_URL: url, MILLRACE_TOKEN: (await read('state/client-token')).trim() };
    await answer(['nodes', 'add', '--name', 'box', '--out', 'box.env'], place, { env });
    const start = ['node', 'start', '--env-file', 'box.env', '--json', '--data', 'box'];
    const bare = await ask(start, place);
    expect([bare.code, bare.stdout]).toMatchObject([2, expect.stringContaining('compute: true')]);
    await write('millrace.config.json', '{ "compute": { "limits": { "maxWallMs": 200 }, "workers": 2 } }');
    await using node = new Program(start, place);
    expect(await node.firstDocument()).toMatchObject({ capabilities: ['/compute/v1'] });
    const ended = await ask(['submit', 'job.yaml', '--watch', '--json'], place, { env });
    expect(ended.code).toBe(1);
    const { job_id: jobId } = json(ended.stdout);
    const { tasks } = json(await answer(['job', 'show', jobId, '--json'], place, { env }));
    const statusOf = (label: string) => tasks.find((task: { label: string }) => task.label === label);
    expect(statusOf('ends')).toMatchObject({ status: 'completed' });
    expect(statusOf('does not')).toMatchObject({
      status: 'failed',
      reason: expect.stringContaining('wall-clock limit exceeded after 200ms'),
    });
    node.signal('SIGTERM');
    expect((await node.ended).code).toBe(0);
  });

  test('compute: false leaves a node without them, and a job of them is refused by run', async () => {
    await writeSum();
    await write('job.yaml', 'tasks: [{ capability: /compute/v1, meta: { ref: op://sum } }]\n');
    await write('millrace.config.json', '{ "compute": false }');
    const refused = await ask(['run', 'job.yaml'], place);
    expect([refused.code, refused.stderr]).toEqual([
      2,
      expect.stringContaining('nothing here can run job.yaml'),
    ]);
    await using up = new Program(['up', '--port', '0', '--json'], place);
    expect(await up.firstDocument()).toMatchObject({ capabilities: [] });
  });
});
