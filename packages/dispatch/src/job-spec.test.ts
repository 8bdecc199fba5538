import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { JOB_LIMITS, parseJobSpec, parseStageReference } from './job-spec.ts';
import type { JobSpec } from './records.ts';

const DOMAIN = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';
const NOW = Date.UTC(2026, 0, 1);
const OPTIONS = { defaultDomainId: DOMAIN, maxTasks: 10_000, now: NOW };

const parse = (value: unknown, options = {}): JobSpec => parseJobSpec(value, { ...OPTIONS, ...options });

/** The problems a value has; empty when it is taken. */
function problems(value: unknown, options = {}): readonly string[] {
  try {
    parse(value, options);
    return [];
  } catch (error) {
    if (!MillraceError.is(error)) throw error;
    expect(error.code).toBe('invalid_argument');
    return error.details['problems'] as string[];
  }
}

const task = (extra: object = {}): object => ({ capability: '/a', ...extra });
const job = (extra: object, ...tasks: object[]): object => ({
  tasks: tasks.length > 0 ? tasks : [task()],
  ...extra,
});

describe('defaults', () => {
  test('the smallest job has every member', () => {
    expect(parse({ tasks: [{ capability: '/a' }] })).toEqual({
      label: 'job',
      domain_id: DOMAIN,
      priority: 0,
      meta: {},
      edges: [],
      deadline_at: null,
      tasks: [
        {
          label: 'task-1',
          stage: 'task-1',
          capability: '/a',
          capability_filters: {},
          priority: 0,
          inputs_cids: [],
          outputs_prefix: null,
          mode: 'public',
          meta: null,
          max_attempts: 3,
          deadline_at: null,
        },
      ],
    });
  });

  test('cache is there only when it is true, so that every other job is what it was', () => {
    expect(parse(job({ cache: true })).cache).toBe(true);
    for (const cache of [false, null, undefined]) expect('cache' in parse(job({ cache }))).toBe(false);
    expect(problems(job({ cache: 'yes' }))).toEqual(['job.cache must be true or false, got "yes"']);
  });

  test('null is absent, unknown members are ignored', () => {
    const nulls = {
      label: null,
      stage: null,
      capability_filters: null,
      priority: null,
      inputs_cids: null,
      outputs_prefix: null,
      mode: null,
      meta: null,
      max_attempts: null,
      deadline_at: null,
    };
    const value = {
      label: null,
      domain_id: null,
      priority: null,
      meta: null,
      edges: null,
      deadline_at: null,
    };
    expect(parse({ ...value, more: 1, tasks: [{ capability: '/a', ...nulls, other: {} }] })).toEqual(
      parse({ tasks: [{ capability: '/a' }] }),
    );
  });

  test('everything given is kept', () => {
    const given = {
      label: 'mine',
      domain_id: '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10',
      priority: -3,
      meta: { a: [1, { b: null }] },
      edges: [{ from: 'one', to: 'two' }],
      deadline_at: '2026-01-02T00:00:00.000Z',
      tasks: [
        {
          label: 'x',
          stage: 'one',
          capability: '/examples/hello/v1',
          capability_filters: { gpu: '', zone: { In: ['eu', 'us'] }, spot: { DoesNotExist: true } },
          priority: Number.MAX_SAFE_INTEGER,
          inputs_cids: ['a', 'http://h/x'],
          outputs_prefix: 'out/here/',
          mode: 'dedicated',
          meta: [1, 2],
          max_attempts: 100,
          deadline_at: '2026-01-03T00:00:00.000Z',
        },
        { ...parse(job({})).tasks[0], label: 'y', stage: 'two', inputs_cids: ['stage:one/**'] },
      ],
    };
    expect(parse(given)).toEqual(given);
  });

  test('a stage is the label, a priority is that of the job, unless given', () => {
    const { tasks } = parse(
      job({ priority: 5 }, task({ label: 'x' }), task({ label: 'y', stage: 's', priority: 1 }), task()),
    );
    expect(tasks.map(({ label, stage, priority }) => [label, stage, priority])).toEqual([
      ['x', 'x', 5],
      ['y', 's', 1],
      ['task-3', 'task-3', 5],
    ]);
  });

  test('ids are lower case, times are UTC, equal edges are one', () => {
    const spec = parse(
      job(
        {
          domain_id: DOMAIN.toUpperCase(),
          deadline_at: '2026-01-02t03:00:00+02:00',
          edges: [
            { from: 'a', to: 'b' },
            { from: 'a', to: 'b' },
          ],
        },
        task({ label: 'a' }),
        task({ label: 'b' }),
      ),
    );
    expect(spec.domain_id).toBe(DOMAIN);
    expect(spec.deadline_at).toBe('2026-01-02T01:00:00.000Z');
    expect(spec.edges).toEqual([{ from: 'a', to: 'b' }]);
  });
});

describe('refusals name the path, the rule and the value', () => {
  test.each([
    ['no object', 5, 'job must be a JSON object, got 5'],
    ['an array', [], 'job must be a JSON object, got []'],
    ['nothing', undefined, 'job must be a JSON object, got nothing'],
    ['no tasks', {}, 'job.tasks must be an array of 1 to 10000 tasks, got nothing'],
    ['an empty list of tasks', { tasks: [] }, 'job.tasks must be an array of 1 to 10000 tasks, got []'],
    ['a task that is text', { tasks: ['x'] }, 'job.tasks[0] must be a JSON object, got "x"'],
    ['no capability', { tasks: [{}] }, 'job.tasks[0].capability must be a non-empty string, got nothing'],
    [
      'white space in a capability',
      job({}, task({ capability: '/a b' })),
      'job.tasks[0].capability must not contain white space',
    ],
    ['a domain that is no UUID', job({ domain_id: 'x' }), 'job.domain_id must be a UUID, got "x"'],
    ['meta that is a list', job({ meta: [] }), 'job.meta must be a JSON object, got []'],
    ['a priority that is text', job({ priority: '5' }), 'job.priority must be an integer between'],
    ['a priority with a fraction', job({ priority: 0.5 }), 'job.priority must be an integer between'],
    [
      'a priority beyond what is exact',
      job({ priority: 2 ** 53 }),
      'job.priority must be an integer between',
    ],
    [
      'a mode of neither kind',
      job({}, task({ mode: 'secret' })),
      'job.tasks[0].mode must be "public" or "dedicated", got "secret"',
    ],
    [
      'filters that are no text',
      job({}, task({ capability_filters: { gpu: 1 } })),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'filters with an operator nobody knows',
      job({}, task({ capability_filters: { gpu: { Gt: ['1'] } } })),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'a filter without operators',
      job({}, task({ capability_filters: { gpu: {} } })),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'an operator without values',
      job({}, task({ capability_filters: { gpu: { In: [] } } })),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'a filter of values that are no text',
      job({}, task({ capability_filters: { gpu: { NotIn: [1] } } })),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'a filter of more values than may be',
      job(
        {},
        task({
          capability_filters: { gpu: { In: Array.from({ length: 33 }, (_, index) => String(index)) } },
        }),
      ),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'a filter of a value that is too long',
      job({}, task({ capability_filters: { gpu: { In: ['x'.repeat(257)] } } })),
      'job.tasks[0].capability_filters.gpu must be a string',
    ],
    [
      'a time without offset',
      job({ deadline_at: '2026-01-02T00:00:00' }),
      'job.deadline_at must be an RFC 3339 time',
    ],
    [
      'a day that does not exist',
      job({ deadline_at: '2026-13-41T00:00:00Z' }),
      'job.deadline_at must be an RFC 3339 time',
    ],
    ['a time that is a number', job({ deadline_at: 5 }), 'job.deadline_at must be an RFC 3339 time'],
    ['the past', job({ deadline_at: '2026-01-01T00:00:00.000Z' }), 'job.deadline_at must lie in the future'],
    [
      'a prefix that climbs',
      job({}, task({ outputs_prefix: 'a/../../b' })),
      'job.tasks[0].outputs_prefix must be a path',
    ],
    [
      'an empty input',
      job({}, task({ inputs_cids: [''] })),
      'job.tasks[0].inputs_cids[0] must be a string of 1 to',
    ],
    [
      'an edge to nowhere',
      job({ edges: [{ from: 'task-1', to: 'x' }] }),
      'job.edges[0].to must be the stage of some task, got "x"',
    ],
    [
      'an edge to itself',
      job({ edges: [{ from: 'task-1', to: 'task-1' }] }),
      'job.edges[0] must not lead from a stage to itself, got "task-1"',
    ],
    [
      'an edge without an end',
      job({ edges: [{ from: 'task-1' }] }),
      'job.edges[0].to must be a string of 1 to',
    ],
    [
      'an unknown stage',
      job({}, task({ inputs_cids: ['stage:x/*'] })),
      'job.tasks[0].inputs_cids[0] must name a stage of this job, got "stage:x/*"',
    ],
  ])('%s', (_, value, expected) => {
    expect(problems(value).join('\n')).toContain(expected);
  });

  test('the future begins one millisecond from now', () => {
    expect(problems(job({ deadline_at: '2026-01-01T00:00:00.001Z' }))).toEqual([]);
  });

  test('all problems are told at once, the first twenty of them', () => {
    const few = problems({ label: '', domain_id: 5, tasks: [{}, { capability: '/a', mode: 1 }] });
    expect(few).toHaveLength(4);
    const many = problems({ tasks: Array.from({ length: 50 }, () => ({})) });
    expect(many).toHaveLength(JOB_LIMITS.problems + 1);
    expect(many.at(-1)).toBe('and 30 more problems');
  });

  test('a long value is cut', () => {
    const [text] = problems(job({ domain_id: 'x'.repeat(10_000) }));
    expect(text?.length).toBeLessThan(200);
  });
});

describe('every limit holds at it, and not one past it', () => {
  const many = (count: number, extra: object = {}): object[] =>
    Array.from({ length: count }, () => task(extra));
  const filters = (count: number): object =>
    Object.fromEntries(Array.from({ length: count }, (_, index) => [`k${index}`, 'v']));
  const nested = (depth: number): unknown => (depth === 0 ? 1 : { a: nested(depth - 1) });
  const staged = (glob: string): object =>
    job(
      { edges: [{ from: 'a', to: 'b' }] },
      task({ label: 'a' }),
      task({ label: 'b', inputs_cids: [`stage:a/${glob}`] }),
    );
  test.each<[string, (size: number) => object, number]>([
    ['tasks', (size) => ({ tasks: many(size) }), 100],
    ['bytes of a label', (size) => job({ label: 'x'.repeat(size) }), JOB_LIMITS.nameBytes],
    [
      'bytes of a stage, counted in UTF-8',
      (size) => job({}, task({ stage: `é${'x'.repeat(size - 2)}` })),
      JOB_LIMITS.nameBytes,
    ],
    ['bytes of a capability', (size) => job({}, { capability: 'x'.repeat(size) }), 256],
    ['filters', (size) => job({}, task({ capability_filters: filters(size) })), JOB_LIMITS.filters],
    [
      'inputs of a task',
      (size) => job({}, task({ inputs_cids: Array.from({ length: size }, () => 'x') })),
      JOB_LIMITS.inputsPerTask,
    ],
    [
      'bytes of an input',
      (size) => job({}, task({ inputs_cids: ['x'.repeat(size)] })),
      JOB_LIMITS.inputBytes,
    ],
    [
      'bytes of a prefix',
      (size) => job({}, task({ outputs_prefix: 'x'.repeat(size) })),
      JOB_LIMITS.prefixBytes,
    ],
    ['attempts', (size) => job({}, task({ max_attempts: size })), JOB_LIMITS.maxAttempts],
    ['depth of meta', (size) => job({}, task({ meta: nested(size) })), JOB_LIMITS.metaDepth],
    ['bytes of a pattern', (size) => staged('x'.repeat(size)), JOB_LIMITS.globBytes],
    ['wildcards of a pattern', (size) => staged('*x'.repeat(size)), JOB_LIMITS.globStars],
  ])('%s', (_, make, limit) => {
    expect(problems(make(limit), { maxTasks: 100 })).toEqual([]);
    expect(problems(make(limit + 1), { maxTasks: 100 })).toHaveLength(1);
  });

  test('attempts begin at 1', () => {
    expect(problems(job({}, task({ max_attempts: 1 })))).toEqual([]);
    expect(problems(job({}, task({ max_attempts: 0 })))).toHaveLength(1);
  });

  test('inputs of all tasks together', () => {
    const inputs = (count: number) => Array.from({ length: count }, () => 'x');
    const tasks = Array.from({ length: 100 }, () => task({ inputs_cids: inputs(10_000) }));
    expect(problems({ tasks })).toEqual([]);
    expect(problems({ tasks: [...tasks, task({ inputs_cids: inputs(1) })] })).toEqual([
      `job must have at most ${JOB_LIMITS.inputsPerJob} inputs in all, got 1000001`,
    ]);
  });

  test('the size of the whole', () => {
    const sized = (bytes: number) => job({}, task({ meta: 'x'.repeat(bytes) }));
    const rest = Buffer.byteLength(JSON.stringify(parse(sized(0))));
    expect(problems(sized(JOB_LIMITS.totalBytes - rest))).toEqual([]);
    expect(problems(sized(JOB_LIMITS.totalBytes - rest + 1))).toEqual([
      expect.stringContaining(`at most ${JOB_LIMITS.totalBytes} bytes`),
    ]);
  });

  test('values JSON cannot carry are refused', () => {
    for (const meta of [NaN, 1n, () => 1, { a: undefined }, [Symbol('x')]]) {
      expect(problems(job({}, task({ meta })))).toHaveLength(1);
    }
  });
});

describe('the graph', () => {
  const stages = (
    names: string,
    edges: readonly string[],
    inputs: Readonly<Record<string, string>> = {},
  ): object => ({
    tasks: names.split('').map((label) => task({ label, inputs_cids: inputs[label] ? [inputs[label]] : [] })),
    edges: edges.map((edge) => ({ from: edge[0], to: edge[1] })),
  });

  test('a cycle is shown', () => {
    expect(problems(stages('abcd', ['ab', 'bc', 'cd', 'db']))).toEqual([
      'job.edges must not form a cycle, got b -> c -> d -> b',
    ]);
  });

  test('a diamond is no cycle', () => {
    expect(problems(stages('abcd', ['ab', 'ac', 'bd', 'cd']))).toEqual([]);
  });

  test('an input may name a stage any number of edges before, and no other', () => {
    const edges = ['ab', 'bc', 'xc'];
    for (const earlier of ['a', 'b', 'x']) {
      expect(problems(stages('abcx', edges, { c: `stage:${earlier}/*` }))).toEqual([]);
    }
    for (const [stage, input] of [
      ['a', 'stage:c'],
      ['b', 'stage:x'],
      ['c', 'stage:c'],
    ] as const) {
      expect(problems(stages('abcx', edges, { [stage]: input }))).toEqual([
        expect.stringContaining(`must name a stage with edges leading to stage "${stage}", got "${input}"`),
      ]);
    }
  });

  test('a chain as long as a job may be is taken, with references to its start', () => {
    const names = Array.from({ length: 10_000 }, (_, index) => `s${index}`);
    const spec = parse({
      tasks: names.map((label, index) => task({ label, inputs_cids: index > 0 ? ['stage:s0'] : [] })),
      edges: names.slice(1).map((to, index) => ({ from: names[index], to })),
    });
    expect(spec.edges).toHaveLength(9999);
    expect(problems({ ...spec, edges: [...spec.edges, { from: 's9999', to: 's0' }] })).toEqual([
      expect.stringContaining('cycle, got s0 -> s1 -> s2'),
    ]);
  });
});

describe('times to wait for', () => {
  test('they are kept in UTC, also when they have passed, and left out when there are none', () => {
    const spec = parse(
      job({ not_before: '2026-01-02T03:00:00+02:00' }, task({ not_before: '2025-01-01T00:00:00Z' }), task()),
    );
    expect(spec.not_before).toBe('2026-01-02T01:00:00.000Z');
    expect(spec.tasks.map((each) => each.not_before)).toEqual(['2025-01-01T00:00:00.000Z', undefined]);
    expect(parse(job({ not_before: null }))).not.toHaveProperty('not_before');
    expect(problems(job({ not_before: 'tomorrow' }))).toEqual([
      'job.not_before must be an RFC 3339 time with Z or an offset, got "tomorrow"',
    ]);
  });

  test.each([
    ['the job', { not_before: '2026-01-02T00:00:00Z' }, {}],
    ['the task', {}, { not_before: '2026-01-02T00:00:00Z' }],
  ])('a deadline must lie after the time of %s', (_, jobPart, taskPart) => {
    const at = (deadline_at: string) => [
      problems(job({ ...jobPart, deadline_at }, task(taskPart))),
      problems(job(jobPart, task({ ...taskPart, deadline_at }))),
    ];
    for (const found of at('2026-01-02T00:00:00Z')) {
      expect(found).toEqual([
        expect.stringMatching(/deadline_at must lie after not_before.*T00:00:00\.000Z"$/),
      ]);
    }
    expect(at('2026-01-02T00:00:00.001Z')).toEqual([[], []]);
  });
});

describe('sharing', () => {
  test('a concurrency limit and amounts of resources are kept, and left out when there are none', () => {
    const given = { concurrency: { key: 'küche 7', limit: 2, other: 1 }, resources: { gpu: 1, cpu: 0.5 } };
    const [first, second] = parse(job({}, task(given), task({ concurrency: null, resources: {} }))).tasks;
    expect(first).toMatchObject({
      concurrency: { key: 'küche 7', limit: 2 },
      resources: { cpu: 0.5, gpu: 1 },
    });
    expect(Object.keys(first?.concurrency ?? {})).toEqual(['key', 'limit']);
    expect(second).not.toHaveProperty('concurrency');
    expect(second).not.toHaveProperty('resources');
  });

  test("a job's limit is that of its tasks that have none", () => {
    const own = { key: 'own', limit: 1 };
    const spec = parse(job({ concurrency: { key: 'all', limit: 9 } }, task(), task({ concurrency: own })));
    expect(spec.tasks.map(({ concurrency }) => concurrency)).toEqual([{ key: 'all', limit: 9 }, own]);
    expect(spec).not.toHaveProperty('concurrency');
  });

  test('what is wrong with them is told with its place', () => {
    const { keyLength, maxConcurrency } = JOB_LIMITS;
    const limited = (concurrency: unknown): readonly string[] => problems(job({ concurrency }));
    expect(limited({ key: '😀'.repeat(keyLength), limit: maxConcurrency })).toEqual([]);
    expect(limited({ key: 'k'.repeat(keyLength + 1), limit: 1 })[0]).toMatch(
      /^job\.concurrency\.key must be a string of 1 to 256 characters/,
    );
    expect(limited({ key: '', limit: 0 })).toEqual([
      'job.concurrency.key must be a string of 1 to 256 characters, none of them a control character, got ""',
      'job.concurrency.limit must be an integer from 1 to 1000000, got 0',
    ]);
    expect(limited({ key: 'a\n', limit: maxConcurrency + 1 })).toHaveLength(2);
    expect(limited({ limit: 1.5 })).toHaveLength(2);
    expect(limited('k')).toEqual([
      'job.concurrency must be an object such as {"key": "customer-7", "limit": 2}, got "k"',
    ]);
    expect(problems(job({}, task({ resources: { cpu: 0 } }), task({ resources: { GPU: 1 } })))).toEqual([
      'job.tasks[0].resources.cpu must be a multiple of 0.001, above 0 and at most 2^53, got 0',
      'job.tasks[1].resources.GPU is no name of a resource: those are 1 to 63 characters of a-z, 0-9, ".", "_", "/" and "-", and begin with a letter, got 1',
    ]);
    expect(problems(job({}, task({ resources: 4 })))[0]).toContain(
      'job.tasks[0].resources must be an object of 1 to 16 names and amounts',
    );
    expect(parse(job({}, task({ resources: { memory: '1KiB' } }))).tasks[0]?.resources).toEqual({
      memory: 1024,
    });
  });
});

describe('stage references', () => {
  const isStage = (name: string): boolean => ['a', 'a/b', 'c'].includes(name);

  test.each([
    ['data-id', null],
    ['http://h/stage:a', null],
    ['stage:a', { stage: 'a', glob: null, optional: false }],
    ['stage:a/', { stage: 'a', glob: null, optional: false }],
    ['stage:a/*.png', { stage: 'a', glob: '*.png', optional: false }],
    ['stage:a/b', { stage: 'a/b', glob: null, optional: false }],
    ['stage:a/b/c/*', { stage: 'a/b', glob: 'c/*', optional: false }],
    ['stage:a/x/b', { stage: 'a', glob: 'x/b', optional: false }],
    ['stage:nope', { stage: 'nope', glob: null, optional: false }],
    ['stage:nope/x', { stage: 'nope', glob: 'x', optional: false }],
    ['stage?:a/*', { stage: 'a', glob: '*', optional: true }],
    ['stage?:a/b', { stage: 'a/b', glob: null, optional: true }],
    ['stages:a', null],
    ['stage??:a', null],
    ['stage:', { stage: '', glob: null, optional: false }],
  ])('%s', (input, expected) => {
    expect(parseStageReference(input, isStage)).toEqual(expected);
  });
});
