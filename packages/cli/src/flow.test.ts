/** Jobs that are kept, wait for their time, come again and are done again, as their users have them: real processes. */
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Program, answer, ask, makePlace, millrace, type Place } from './program.test.support.ts';

let place: Place;
beforeEach(async () => {
  place = await makePlace();
});
afterEach(() => place[Symbol.asyncDispose]());

const write = (name: string, text: string): Promise<void> => writeFile(path.join(place.cwd, name), text);
const json = async <T>(...args: readonly string[]): Promise<T> =>
  JSON.parse(await answer([...args, '--json'], place)) as T;

const eventually = async (what: () => Promise<boolean>): Promise<void> => {
  const deadline = AbortSignal.timeout(25_000);
  while (!(await what())) {
    deadline.throwIfAborted();
    await new Promise((done) => setTimeout(done, 50));
  }
};

/** Fails as long as a file is not there. */
const PICKY = `
import { existsSync } from 'node:fs';
export default {
  capability: '/test/picky/v1',
  async run(ctx) {
    const { needs } = ctx.lease.task.meta ?? {};
    if (needs !== undefined && !existsSync(needs)) throw new Error('not without ' + needs);
  },
};
`;

test('what failed is listed and redriven: the rest of the job is done, once', async () => {
  await write('picky.mjs', PICKY);
  const file = path.join(place.cwd, 'there');
  await write(
    'job.json',
    JSON.stringify({
      label: 'picky',
      tasks: [
        { label: 'fine', capability: '/test/picky/v1' },
        { label: 'picky', capability: '/test/picky/v1', max_attempts: 1, meta: { needs: file } },
        { label: 'after', capability: '/test/picky/v1' },
      ],
      edges: [
        { from: 'fine', to: 'picky' },
        { from: 'picky', to: 'after' },
      ],
    }),
  );
  await using up = new Program(['up', 'picky.mjs', '--port', '0', '--json'], place);
  await up.firstDocument();
  const failed = await ask(['submit', 'job.json', '--watch', '--json'], place);
  expect(failed.code).toBe(1);
  const [{ job: old } = { job: { id: '' } }] = (await json<{ jobs: { job: { id: string } }[] }>('jobs')).jobs;

  const dead = await answer(['dead'], place);
  expect(dead).toContain(old.id);
  expect(dead).toMatch(/picky +\/test\/picky\/v1 .* 1\/1 +.*not without/);
  expect(await answer(['dead', '--capability', '/test/other/v1'], place)).toBe(
    'no task has failed for good\n',
  );
  expect((await json<{ tasks: unknown[] }>('dead', '--job', old.id)).tasks).toHaveLength(1);

  expect(existsSync(file)).toBe(false);
  await writeFile(file, '');
  const redriven = await millrace(['job', 'redrive', old.id, '--watch'], place);
  expect(redriven.stderr).toMatch(/2 tasks to do again/);
  expect(redriven.code).toBe(0);
  const again = await ask(['job', 'redrive', old.id], place);
  expect(again.stderr).toContain('redriven before');
  const id = again.stdout.trim();
  const shown = await answer(['job', 'show', id], place);
  expect(shown).toMatch(new RegExp(`redrives +${old.id}`));
  expect(shown).not.toMatch(/\bfine\b/);
  expect(await answer(['job', 'show', old.id], place)).toMatch(new RegExp(`redriven +as ${id}`));
  expect(await answer(['job', 'explain', old.id], place)).toContain(
    `job ${id} does again what it left undone`,
  );

  const refused = await ask(['job', 'redrive', id], place);
  expect(refused.code).toBe(2);
  expect(refused.stderr).toMatch(/is completed; there is nothing to redrive/);
});

test('a job waits for its time, and says so; queues say what waits', async () => {
  await write('job.yaml', 'not_before: 2999-01-01T00:00:00Z\ntasks:\n  - capability: /test/picky/v1\n');
  await using serve = new Program(['dispatch', 'serve', '--port', '0'], place);
  await serve.firstDocument();
  expect(await answer(['queues'], place)).toBe('nothing waits and nothing runs\n');
  const id = (await answer(['submit', 'job.yaml'], place)).trim();
  expect(await answer(['job', 'show', id], place)).toMatch(/queued .* not before 2999-01-01/);
  expect(await answer(['job', 'explain', id], place)).toMatch(/waits until 2999-01-01T00:00:00\.000Z/);
  expect(await answer(['queues'], place)).toMatch(/\/test\/picky\/v1 +- +0 +0 +1 +0 +- +0 +0\/0\n/);
  const report = await json<{ queues: unknown[] }>('queues');
  expect(report.queues).toEqual([expect.objectContaining({ capability: '/test/picky/v1', delayed: 1 })]);

  await write('bad.yaml', 'not_before: tomorrow\ntasks:\n  - capability: /x/v1\n');
  const bad = await ask(['submit', 'bad.yaml'], place);
  expect(bad.code).toBe(2);
  expect(bad.stderr).toMatch(/bad\.yaml:1:13: not_before/);
});

test('domains are weighed and listed, and what is wrong is said', async () => {
  const domain = 'aaaaaaaa-0000-4000-8000-000000000000';
  await using serve = new Program(['dispatch', 'serve', '--port', '0'], place);
  await serve.firstDocument();
  expect(await answer(['domains'], place)).toBe(
    'nothing waits and nothing runs, and every domain has weight 1\n',
  );
  expect(await answer(['domains', 'weight', domain, '3'], place)).toBe(`domain ${domain} has weight 3\n`);
  await write(
    'job.yaml',
    `domain_id: ${domain}\nconcurrency: { key: k, limit: 1 }\ntasks:\n  - { capability: /x/v1, resources: { memory: 1GiB, gpu: 1 } }\n`,
  );
  await answer(['submit', 'job.yaml'], place);
  expect(await answer(['domains'], place)).toMatch(new RegExp(`${domain} +3 +1 +0\n`));
  expect(await json('domains')).toEqual({
    domains: [{ domain_id: domain, weight: 3, ready: 1, held: 0 }],
  });
  expect(await answer(['queues'], place)).toMatch(/\/x\/v1 +1 gpu 1\.0 GiB +1 /);
  for (const [args, message] of [
    [[domain, '0'], /must be a whole number from 1 to 1000, got "0"/],
    [[domain, '1001'], /got "1001"/],
    [['nobody', '2'], /the domain id must be a UUID, got "nobody"/],
  ] as const) {
    const refused = await ask(['domains', 'weight', ...args], place);
    expect(refused.code).toBe(2);
    expect(refused.stderr).toMatch(message);
  }
});

test('a schedule is added, listed, replaced, due and removed', async () => {
  await write('job.yaml', 'label: often\ntasks:\n  - capability: /test/picky/v1\n');
  await using serve = new Program(['dispatch', 'serve', '--port', '0'], place);
  await serve.firstDocument();
  expect(await answer(['schedules'], place)).toMatch(/^no schedules yet/);
  const added = await millrace(
    ['schedules', 'add', 'nightly', '30 2 * * *', 'job.yaml', '--time-zone', 'Europe/Berlin'],
    place,
  );
  expect(added).toMatchObject({ code: 0, stderr: '' });
  expect(added.stdout).toMatch(/^schedule nightly is kept; first at \d{4}-.*Z\n$/);
  const taken = await ask(['schedules', 'add', 'nightly', '* * * * *', 'job.yaml'], place);
  expect(taken.code).toBe(2);
  expect(taken.stderr).toMatch(/has a schedule named "nightly"/);
  const kept = await json<{ cron: string; overlap: string }>(
    'schedules',
    'add',
    'nightly',
    '* * * * *',
    'job.yaml',
    '--replace',
    '--overlap',
    'skip',
  );
  expect(kept).toMatchObject({ cron: '* * * * *', overlap: 'skip' });
  expect(await answer(['schedules'], place)).toMatch(/^nightly +\* \* \* \* \* +UTC +.* +- +often$/m);
  expect((await json<{ schedules: unknown[] }>('schedules', 'list')).schedules).toHaveLength(1);
  expect(await answer(['schedules', 'remove', 'nightly'], place)).toBe('schedule nightly is removed\n');
  const gone = await ask(['schedules', 'remove', 'nightly'], place);
  expect(gone.code).toBe(2);
});

describe('retention', () => {
  test('jobs that ended longer ago than they are kept go by themselves', async () => {
    await write('job.json', '{"tasks":[{"capability":"/test/picky/v1"}]}');
    // A bit less than a second.
    await using serve = new Program(['dispatch', 'serve', '--port', '0', '--keep-jobs', '0.00001'], place);
    await serve.firstDocument();
    const ended = (await answer(['submit', 'job.json'], place)).trim();
    const waiting = (await answer(['submit', 'job.json'], place)).trim();
    await answer(['job', 'cancel', ended], place);
    await eventually(async () => (await ask(['job', 'show', ended], place)).code === 2);
    expect((await ask(['job', 'show', waiting], place)).code).toBe(0);
  });

  test('a lease lives as long as the operator says', async () => {
    await using serve = new Program(['dispatch', 'serve', '--port', '0', '--lease-ttl', '1'], place);
    await serve.firstDocument();
    await answer(['nodes', 'add', '--name', 'mortal', '--out', 'mortal.env'], place);
    await write(
      'mortal.mjs',
      "export default { capability: '/test/mortal/v1', run: () => new Promise(() => {}) };",
    );
    const start = ['node', 'start', '--env-file', 'mortal.env', '--runner', './mortal.mjs'];
    await using node = new Program(start, place);
    await write('mortal.json', '{"tasks":[{"capability":"/test/mortal/v1"}]}');
    const id = (await answer(['submit', 'mortal.json'], place)).trim();
    type Shown = { tasks: { status: string }[]; receipts: { outcome: string }[] };
    const shown = async (): Promise<Shown> =>
      JSON.parse(await answer(['job', 'show', id, '--json'], place)) as Shown;
    await eventually(async () => (await shown()).tasks[0]?.status === 'running');
    node.signal('SIGKILL');
    await eventually(async () => (await shown()).receipts[0]?.outcome === 'expired');
  });

  test.each([
    [['--lease-ttl', '0'], {}, '--lease-ttl must be'],
    [['--lease-ttl', '86401'], {}, '--lease-ttl must be'],
    [[], { MILLRACE_LEASE_TTL: 'long' }, 'MILLRACE_LEASE_TTL must be'],
    [['--keep-jobs', '0'], {}, '--keep-jobs must be a number of days above 0 and up to 36500, got "0"'],
    [['--keep-jobs', '30d'], {}, '--keep-jobs must be a number of days'],
    [['--keep-jobs', '36501'], {}, '--keep-jobs must be a number of days'],
    [[], { MILLRACE_KEEP_JOBS: '-1' }, 'MILLRACE_KEEP_JOBS must be a number of days'],
    [[], { MILLRACE_PRUNE_ARTIFACTS: 'yes' }, 'MILLRACE_PRUNE_ARTIFACTS must be true or false, got "yes"'],
    [['--prune-artifacts'], {}, 'say how long those are kept with --keep-jobs DAYS'],
  ])('%j with %j is refused', async (args, env, message) => {
    const { code, stderr } = await ask(['dispatch', 'serve', '--port', '0', ...args], place, { env });
    expect(code).toBe(2);
    expect(stderr).toContain(message);
  });
});
