/** `job logs` and `job explain` as their users have them: real processes, and a node that is killed. */
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { Program, answer, ask, makePlace, millrace, type Place } from './program.test.support.ts';

let place: Place;
beforeEach(async () => {
  place = await makePlace();
});
afterEach(() => place[Symbol.asyncDispose]());

const write = (name: string, text: string): Promise<void> => writeFile(path.join(place.cwd, name), text);

/** Says what it does on every way there is; what it does next depends on files, so that tests decide when. */
const TALK = `
import { existsSync } from 'node:fs';
const there = async (file, signal) => {
  while (!existsSync(file)) {
    signal.throwIfAborted();
    await new Promise((done) => setTimeout(done, 10));
  }
};
export default {
  capability: '/test/talk/v1',
  async run(ctx) {
    const { name, until, fail } = ctx.lease.task.meta;
    console.log(name + ' begins: ümläut 😀');
    console.error(name + ' complains');
    ctx.log.info('working', { part: 1 });
    await ctx.ctrl.logEvent({ kind: 'frame', n: 1 });
    if (until !== undefined) await there(until, ctx.signal);
    if (fail !== undefined && !existsSync(fail)) {
      console.log('nothing doing');
      throw new Error('not yet');
    }
    console.log('    indented end');
  },
};
`;

const job = (tasks: object[]): string =>
  JSON.stringify({
    label: 'talk',
    tasks: tasks.map((task) => ({ capability: '/test/talk/v1', ...task })),
  });

const submit = async (env: Record<string, string> = {}): Promise<string> =>
  (await answer(['submit', 'job.json'], place, { env })).trim();

/** The ids of the job's tasks, by label. */
const tasksOf = async (jobId: string, env: Record<string, string> = {}): Promise<Record<string, string>> => {
  const { tasks } = JSON.parse(await answer(['job', 'show', jobId, '--json'], place, { env })) as {
    tasks: { id: string; label: string }[];
  };
  return Object.fromEntries(tasks.map(({ id, label }) => [label, id]));
};

const eventually = async (what: () => Promise<boolean>): Promise<void> => {
  const deadline = AbortSignal.timeout(25_000);
  while (!(await what())) {
    deadline.throwIfAborted();
    await new Promise((done) => setTimeout(done, 50));
  }
};

test('the log of a job: all attempts from the first line, in part, by task, as a document, and followed', async () => {
  await write('talk.mjs', TALK);
  const ok = path.join(place.cwd, 'ok');
  const go = path.join(place.cwd, 'go');
  await write(
    'job.json',
    job([{ label: 'lone', max_attempts: 3, meta: { name: 'lone', fail: ok, until: go } }]),
  );
  await using up = new Program(['up', 'talk.mjs', '--port', '0', '--json'], place);
  await up.firstDocument();
  const jobId = await submit();
  const taskId = (await tasksOf(jobId))['lone']!;

  // Followed by a real process from before the first attempt has ended.
  await using tail = new Program(['job', 'logs', '-f', jobId], place);
  await tail.printed('stdout', /^lone begins: ümläut 😀\n/);
  await tail.printed('stdout', /frame/);
  expect(tail.stdout).not.toContain('nothing doing');
  // The past is there while it runs.
  const first = [
    'lone begins: ümläut 😀',
    'lone complains',
    'info  working  part=1',
    '{"kind":"frame","n":1}',
  ];
  await eventually(async () => (await answer(['job', 'logs', taskId], place)).split('\n').length === 5);
  expect((await answer(['job', 'logs', taskId], place)).split('\n').toSorted()).toEqual(
    ['', ...first].toSorted(),
  );

  await writeFile(go, '');
  await tail.printed('stdout', /nothing doing/);
  // The report of the failure comes right after its last words.
  await eventually(async () =>
    /attempts that ended\n {2}1 .*failed after/.test(await answer(['job', 'explain', taskId], place)),
  );
  await writeFile(ok, '');
  const followed = await tail.ended;
  expect([followed.code, followed.stderr]).toEqual([0, '']);
  expect(followed.stdout).toMatch(
    /^lone begins[^]*^nothing doing\n[^]*^#[23] {2}lone begins[^]*^#[23] {6}indented end\n$/m,
  );

  // What was followed is what is kept.
  const sorted = (text: string): string[] => text.trimEnd().split('\n').toSorted();
  const whole = await answer(['job', 'logs', jobId], place);
  expect(sorted(whole)).toEqual(sorted(followed.stdout));
  const firstOnly = await answer(['job', 'logs', jobId, '--attempt', '1'], place);
  expect(sorted(firstOnly)).toEqual([...first, 'nothing doing'].toSorted());
  expect(await answer(['job', 'logs', jobId, '--attempt', '1', '--stream', 'stderr'], place)).toBe(
    'lone complains\n',
  );
  expect(await answer(['job', 'logs', jobId, '--attempt', '1', '--stream', 'event'], place)).toBe(
    '{"kind":"frame","n":1}\n',
  );
  // From the end of the newest attempt: whole lines only.
  const end = await answer(['job', 'logs', taskId, '--offset', '-120'], place);
  expect(end).toMatch(/^#[23] {6}indented end\n$/);

  const document = JSON.parse(await answer(['job', 'logs', jobId, '--json'], place)) as {
    job_id: string;
    logs: { task_id: string; attempt: number; at: string; stream?: string; text?: string }[];
  };
  expect(document.job_id).toBe(jobId);
  expect(document.logs).toHaveLength(whole.trimEnd().split('\n').length);
  expect(document.logs).toContainEqual({
    at: expect.stringMatching(/^\d{4}-.*Z$/),
    task_id: taskId,
    attempt: 1,
    stream: 'stderr',
    text: 'lone complains',
  });
  expect(JSON.parse(await answer(['job', 'logs', '-f', jobId, '--json'], place))).toEqual(document);

  expect(await answer(['job', 'explain', taskId], place)).toMatch(
    /^lone {2}completed {2}\/test\/talk\/v1\n {2}completed .* by node local in/,
  );
  expect(await answer(['job', 'explain', jobId], place)).toMatch(
    /the job is completed; 1 of 1 tasks are completed/,
  );

  const codes = async (...args: string[]): Promise<[number | null, string]> => {
    const { code, stderr } = await ask(['job', ...args], place);
    return [code, stderr];
  };
  const nobody = '00000000-0000-7000-8000-000000000000';
  expect(await codes('logs', nobody)).toEqual([
    2,
    expect.stringContaining(`there is no job and no task ${nobody}`),
  ]);
  expect(await codes('explain', nobody)).toEqual([
    2,
    expect.stringContaining(`there is no task and no job ${nobody}`),
  ]);
  expect(await codes('logs', jobId, '--task', nobody)).toEqual([2, expect.stringContaining('has no task')]);
  expect(await codes('logs', jobId, '--stream', 'x')).toEqual([
    2,
    expect.stringContaining('--stream must be one of'),
  ]);
  expect(await codes('logs', jobId, '--attempt', '0')).toEqual([2, expect.stringContaining('--attempt')]);
  expect(await codes('logs', jobId, '--offset', '99999999')).toEqual([
    2,
    expect.stringContaining('is past the end'),
  ]);
});

test('several tasks are told apart, and a failure shows what the task said last', async () => {
  await write('talk.mjs', TALK);
  await write(
    'job.json',
    job([
      { label: 'a', stage: 'one', meta: { name: 'A' } },
      { label: 'b', stage: 'two', meta: { name: 'B', fail: '/nowhere/at/all' }, max_attempts: 1 },
    ]),
  );
  await using up = new Program(['up', 'talk.mjs', '--port', '0', '--json'], place);
  await up.firstDocument();
  const jobId = await submit();
  const watched = await millrace(['job', 'watch', jobId], place);
  expect(watched.code).toBe(1);
  expect(watched.stdout).toContain('last log lines of two/b:');
  expect(watched.stdout).toMatch(/^ {4}nothing doing$/m);
  expect(watched.stdout).toMatch(/^ {4}info {2}working {2}part=1$/m);
  const { b } = await tasksOf(jobId);
  const text = await answer(['job', 'logs', jobId], place);
  expect(text).toMatch(/^two\/b {2}B begins: ümläut 😀$/m);
  expect(await answer(['job', 'logs', jobId, '--task', b!], place)).toMatch(/^B begins: ümläut 😀$/m);
  const { code, stderr } = await ask(['job', 'logs', jobId, '--offset', '0'], place);
  expect([code, stderr]).toEqual([2, expect.stringContaining('--offset counts in the log of one task')]);
});

test('from a dispatcher without nodes to a node that is killed: what waits is explained, and what was said is kept', async () => {
  await write('talk.mjs', TALK);
  await write(
    'job.json',
    job([{ label: 'lone', meta: { name: 'lone', until: path.join(place.cwd, 'go') } }]),
  );
  await using dispatcher = new Program(['dispatch', 'serve', '--port', '0', '--data', 'state'], place);
  const { url } = await dispatcher.firstDocument<{ url: string }>();
  const env = { MILLRACE_DATA: path.join(place.cwd, 'state'), MILLRACE_URL: url };
  const jobId = await submit(env);
  const taskId = (await tasksOf(jobId, env))['lone']!;
  const explain = async (id = taskId): Promise<string> =>
    (await millrace(['job', 'explain', id], place, { env })).stdout;
  expect(await explain()).toBe(
    'lone  queued  /test/talk/v1\n' +
      '  no node has ever registered here; "millrace node start" runs one, "millrace nodes add" makes its credentials\n',
  );
  await answer(['nodes', 'add', '--name', 'garage', '--out', 'garage.env'], place, { env });
  const start = ['node', 'start', '--env-file', 'garage.env', '--runner', 'talk.mjs', '--json'];
  const node = new Program(start, place);
  try {
    await node.firstDocument();
    await eventually(async () => (await answer(['job', 'logs', taskId], place, { env })).includes('"n":1'));
    expect(await explain()).toMatch(
      /^lone {2}running {2}.*\n {2}node garage has been working on it for .*; the lease ends in/,
    );
    expect(await explain(jobId)).toMatch(/1 task {2}lone\n {2}node garage has been working on it/);
    node.signal('SIGKILL');
    await node.ended;
  } finally {
    await node[Symbol.asyncDispose]();
  }
  // The lease expires; the task waits for the node, which is away.
  await eventually(async () =>
    (await answer(['job', 'explain', taskId], place, { env })).startsWith('lone  queued'),
  );
  const kept = await answer(['job', 'logs', taskId], place, { env });
  expect(kept).toMatch(/^lone begins: ümläut 😀$/m);
  expect(await explain()).toMatch(/1 .*expired after .* on garage: lease expired/);

  // Another start of the same node does the rest; both attempts are there.
  await using again = new Program(start, place);
  await again.firstDocument();
  await writeFile(path.join(place.cwd, 'go'), '');
  const { stdout, code } = await millrace(['job', 'logs', '-f', jobId, '--stream', 'stdout'], place, { env });
  expect(code).toBe(0);
  expect(stdout).toBe('lone begins: ümläut 😀\n#2  lone begins: ümläut 😀\n#2      indented end\n');
  expect(existsSync(path.join(place.cwd, 'state'))).toBe(true);
}, 90_000);
