/** Programs that tasks name, routed and supervised: the config file, a node, a dispatcher, real processes. */
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { Program, answer, makePlace, millrace, type Place } from './program.test.support.ts';

let place: Place;
beforeEach(async () => {
  place = await makePlace();
});
afterEach(() => place[Symbol.asyncDispose]());

const write = (name: string, text: string): Promise<void> => writeFile(path.join(place.cwd, name), text);

test('a job runs by the bounds, labels and variables of the config, and fails by its own', async () => {
  await write(
    'millrace.config.mjs',
    `import { subprocessRunner } from '${import.meta.resolve('@millrace/exec')}';
     const sandbox = { tier: 'none' };
     export default {
       env: { WHO: 'operator' },
       supervision: { maxRetries: 3, floorMs: 1 },
       runners: [
         subprocessRunner({ allow: ['false'], sandbox }),
         { runner: subprocessRunner({ name: 'shell', allow: ['sh'], allowEnv: ['WHO'], sandbox }), labels: { shell: 'yes' } },
       ],
     };`,
  );
  const tries = path.join(place.cwd, 'tries');
  const script = `echo x >> ${tries}; test $(wc -l < ${tries}) -ge 3 || exit 5; echo "$WHO" > "$1"`;
  const task = (supervision: object): object => ({
    capability: '/exec/subprocess/v1',
    capability_filters: { shell: { Exists: true } },
    max_attempts: 1,
    meta: {
      mode: { command: { command: 'sh', args: ['-c', script, 'sh', '{output:who.txt}'] } },
      env: { WHO: 'task' },
      outputs: ['who.txt'],
      supervision,
    },
  });
  const supervision = { restart: { type: 'onFailure' }, backoff: { firstMs: 1, jitter: 'none' } };
  await write('job.json', JSON.stringify({ tasks: [task({ ...supervision, maxRetries: 2 })] }));
  const done = await millrace(['run', 'job.json', '--out', 'out', '--json'], place);
  expect([done.code, done.stderr]).toEqual([0, expect.any(String)]);
  const { artifacts } = JSON.parse(done.stdout) as { artifacts: { path: string }[] };
  expect(artifacts).toHaveLength(1);
  expect(await readFile(path.join(place.cwd, 'out/who.txt'), 'utf8')).toBe('operator\n');
  expect(await readFile(tries, 'utf8')).toBe('x\nx\nx\n');

  await write('greedy.json', JSON.stringify({ tasks: [task({ ...supervision, maxRetries: 4 })] }));
  const refused = await millrace(['run', 'greedy.json', '--json'], place);
  expect(refused.code).toBe(1);
  expect(refused.stdout).toContain(
    'meta.supervision.maxRetries must be at most 3, which is what this node allows, got 4',
  );
});

test('a task that waits on its node is explained: for its slot, and until when for its next try', async () => {
  await write(
    'millrace.config.mjs',
    `import { subprocessRunner } from '${import.meta.resolve('@millrace/exec')}';
     export default {
       maxConcurrency: 3,
       runners: [subprocessRunner({ allow: ['sh'], sandbox: { tier: 'none' }, limits: { graceMs: 0 } })],
     };`,
  );
  const task = (label: string, script: string, supervision: object): object => ({
    label,
    capability: '/exec/subprocess/v1',
    meta: { mode: { command: { command: 'sh', args: ['-c', script] } }, supervision },
  });
  const lane = { slot: 'camera', admission: 'queue' };
  const tasks = [
    task('holds', 'sleep 3600', lane),
    task('waits', 'true', lane),
    task('again', 'exit 5', {
      restart: { type: 'onFailure' },
      backoff: { jitter: 'none', firstMs: 3_600_000, maxMs: 3_600_000 },
    }),
  ];
  await write('job.json', JSON.stringify({ tasks }));
  await using up = new Program(['up', '--port', '0', '--data', 'data', '--json'], place);
  await up.firstDocument();
  const at = ['--data', 'data'];
  const { job_id: id } = JSON.parse(await answer(['submit', 'job.json', '--json', ...at], place)) as {
    job_id: string;
  };
  interface Explained {
    readonly groups: readonly { readonly reason: { readonly code: string; readonly message: string } }[];
  }
  const reasons = async (): Promise<Record<string, string>> => {
    const { groups } = JSON.parse(await answer(['job', 'explain', id, '--json', ...at], place)) as Explained;
    return Object.fromEntries(groups.map(({ reason }) => [reason.code, reason.message]));
  };
  await expect.poll(reasons, { timeout: 20_000 }).toEqual({
    running: expect.stringContaining('node local has been working on it'),
    waiting_for_slot: expect.stringMatching(
      /^node local has it, and it has waited there for .+ until slot camera is free$/,
    ),
    between_tries: expect.stringMatching(
      /^node local has it, and tries it again in \d+ min, at \S+Z: try 1 failed, sh ended with exit code 5$/,
    ),
  });
  await answer(['job', 'cancel', id, ...at], place);
  // What still runs when the node is killed would live on.
  const status = async (): Promise<string> =>
    (JSON.parse(await answer(['job', 'show', id, '--json', ...at], place)) as { job: { status: string } }).job
      .status;
  await expect.poll(status, { timeout: 20_000 }).toBe('canceled');
});
