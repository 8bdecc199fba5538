import { describe, expect, test } from 'vitest';
import fc from 'fast-check';
import { MillraceError } from '../errors.ts';
import type { Json, JsonObject } from '../json.ts';
import {
  DEFAULT_BACKOFF,
  JITTER_POLICIES,
  MAX_SCRIPT_BYTES,
  TASK_KINDS,
  admissionFromText,
  admissionToText,
  checkAgentId,
  checkSlot,
  checkTaskId,
  isTerminal,
  jitterFromText,
  lookupEnv,
  mergeEnv,
  parseAdmission,
  parseBackoff,
  parseRestart,
  parseSelector,
  parseTaskKind,
  parseTaskSpec,
  phaseFromText,
  resolveRuntime,
  restartFromText,
  restartToText,
  sameBackoff,
  scriptBody,
  selectorFromFilters,
  selectorMatches,
  taskKindToJson,
  taskSpec,
  taskSpecToJson,
  validateForSubmit,
  type Labels,
  type RunnerSelector,
  type TaskKind,
} from './index.ts';

const EXAMPLE: JsonObject = {
  slot: 'my-job',
  kind: {
    subprocess: {
      mode: { command: { command: 'echo', args: ['hello world'] } },
      failOnNonZero: true,
    },
  },
  timeout: 30_000,
  restart: { type: 'never' },
  backoff: { jitter: 'full', firstMs: 1_000, maxMs: 10_000, factor: 2 },
  admission: 'dropIfRunning',
  runnerSelector: {
    matchLabels: { zone: 'eu' },
    matchExpressions: [{ key: 'gpu', operator: 'Exists' }],
  },
  labels: { team: 'ml' },
};

const command = (more: JsonObject = {}): JsonObject => ({
  subprocess: { mode: { command: { command: 'ls' } }, ...more },
});
const script = (more: JsonObject = {}): JsonObject => ({
  subprocess: { mode: { script: { runtime: 'bash', body: 'ZWNobw==', ...more } } },
});
const kind = (value: Json): TaskKind => parseTaskKind(value, 'kind');

describe('names of slots, tasks and agents', () => {
  test.each([
    [checkSlot, 64],
    [checkTaskId, 256],
    [checkAgentId, 128],
  ] as const)('%o takes harmless characters up to its length %i', (check, length) => {
    for (const good of ['a', 'A-Z_0.9', '...', 'x'.repeat(length)]) check(good);
    const refused = ['', '.', '..', 'build/frontend', 'with space', 'a\n', 'ä', 'x'.repeat(length + 1)];
    for (const bad of refused) expect(() => check(bad)).toThrow(MillraceError);
  });

  test('say which one, which rule, and where', () => {
    expect(() => checkSlot('')).toThrow('invalid model: slot: slot cannot be empty');
    expect(() => checkTaskId('a b', 'x.id')).toThrow(
      /^invalid model: x.id: task id must be letters.*got "a b"/,
    );
    expect(() => checkSlot('x'.repeat(65))).toThrow('slot must be at most 64 characters, got 65');
  });
});

describe('environments', () => {
  const task = [
    { key: 'FOO', value: 'task-1' },
    { key: 'FOO', value: 'task-2' },
    { key: 'B', value: '1' },
  ];
  const operator = [
    { key: 'FOO', value: 'runner-1' },
    { key: 'FOO', value: 'runner-2' },
    { key: 'P', value: '/x' },
  ];

  test('merge to a sorted map in which the operator wins, and within a side the last', () => {
    const merged = mergeEnv(task, operator);
    expect(merged).toEqual({ B: '1', FOO: 'runner-2', P: '/x' });
    expect(Object.keys(merged)).toEqual(['B', 'FOO', 'P']);
    expect(mergeEnv(task, [])).toEqual({ B: '1', FOO: 'task-2' });
    expect(Object.keys(mergeEnv([{ key: '__proto__', value: 'x' }], []))).toEqual(['__proto__']);
  });

  test('are looked up by the last entry', () => {
    expect(lookupEnv(task, 'FOO')).toBe('task-2');
    expect(lookupEnv(task, 'P')).toBeUndefined();
  });
});

describe('a selector', () => {
  const selector = (...matchExpressions: RunnerSelector['matchExpressions'][number][]): RunnerSelector => ({
    matchLabels: {},
    matchExpressions,
  });

  test.each([
    ['In', ['a', 'b'], 'a', true],
    ['In', ['a', 'b'], 'c', false],
    ['In', ['a', 'b'], undefined, false],
    ['NotIn', ['a', 'b'], 'a', false],
    ['NotIn', ['a', 'b'], 'c', true],
    ['NotIn', ['a', 'b'], undefined, true],
    ['Exists', [], '', true],
    ['Exists', [], undefined, false],
    ['DoesNotExist', [], 'a', false],
    ['DoesNotExist', [], undefined, true],
  ] as const)('%s %j with the value %j: %s', (operator, values, value, matches) => {
    const labels: Labels = value === undefined ? { other: 'a' } : { other: 'z', key: value };
    expect(selectorMatches(selector({ key: 'key', operator, values }), labels)).toBe(matches);
  });

  test('is a conjunction, equal to the byte, and minds no label it does not name', () => {
    const both = {
      matchLabels: { zone: 'eu', disk: 'ssd' },
      matchExpressions: [{ key: 'gpu', operator: 'Exists', values: [] }],
    } as const;
    const all = { zone: 'eu', disk: 'ssd', gpu: '', more: 'x' };
    expect(selectorMatches(both, all)).toBe(true);
    expect(selectorMatches(both, { ...all, zone: 'EU' })).toBe(false);
    expect(selectorMatches(both, { zone: 'eu', disk: 'ssd' })).toBe(false);
    expect(selectorMatches(selector(), {})).toBe(true);
    expect(selectorMatches({ matchLabels: { constructor: 'x' }, matchExpressions: [] }, {})).toBe(false);
    expect(selectorMatches(selector({ key: 'toString', operator: 'Exists', values: [] }), {})).toBe(false);
  });

  test.each<[JsonObject, string]>([
    [{ matchExpressions: [{ key: '', operator: 'Exists' }] }, 'selector requirement key cannot be empty'],
    [
      { matchExpressions: [{ key: 'K', operator: 'In' }] },
      "selector requirement 'K' with operator In must have non-empty values",
    ],
    [
      { matchExpressions: [{ key: 'K', operator: 'NotIn', values: [] }] },
      "selector requirement 'K' with operator NotIn must have non-empty values",
    ],
    [
      { matchExpressions: [{ key: 'K', operator: 'Exists', values: ['x'] }] },
      "selector requirement 'K' with operator Exists must not have values",
    ],
    [{ matchLabels: { '': 'x' } }, 'selector label key cannot be empty'],
    [{ matchLabels: { a: 1 } }, 's.matchLabels.a must be a string, got 1'],
    [
      { matchExpressions: [{ key: 'K', operator: 'in', values: ['x'] }] },
      's.matchExpressions[0].operator must be In, NotIn, Exists, DoesNotExist, got "in"',
    ],
  ])('%j is refused', (value, message) => {
    expect(() => parseSelector(value, 's')).toThrow(message);
  });

  test('comes from capability_filters: strings are values, objects are operators', () => {
    expect(
      selectorFromFilters({
        zone: 'eu',
        gpu: { In: ['a100', 'h100'], NotIn: ['k80'] },
        spot: { DoesNotExist: true },
      }),
    ).toEqual({
      matchLabels: { zone: 'eu' },
      matchExpressions: [
        { key: 'gpu', operator: 'In', values: ['a100', 'h100'] },
        { key: 'gpu', operator: 'NotIn', values: ['k80'] },
        { key: 'spot', operator: 'DoesNotExist', values: [] },
      ],
    });
    for (const nothing of [null, 'text', 7, ['gpu'], true, {}] as Json[]) {
      expect(selectorFromFilters(nothing)).toEqual({ matchLabels: {}, matchExpressions: [] });
    }
    const odd: Json[] = [
      1,
      null,
      true,
      [],
      {},
      { In: [] },
      { In: 'a' },
      { In: [1] },
      { Exists: false },
      { Gt: ['1'] },
    ];
    for (const gpu of odd) {
      expect(() => selectorFromFilters({ gpu })).toThrow(
        /^capability_filters.gpu must be a string, or an object/,
      );
    }
  });
});

describe('policies', () => {
  test.each<[string, ReturnType<typeof restartFromText>]>([
    ['', { type: 'never' }],
    [' Never ', { type: 'never' }],
    ['on-failure', { type: 'onFailure' }],
    ['FAILURE', { type: 'onFailure' }],
    ['always', { type: 'always' }],
    ['always:', { type: 'always' }],
    ['always: 60000', { type: 'always', intervalMs: 60_000 }],
    ['always:0', { type: 'always', intervalMs: 0 }],
  ])('the text %j is a restart policy', (text, policy) => {
    expect(restartFromText(text)).toEqual(policy);
    expect(restartFromText(restartToText(policy))).toEqual(policy);
  });

  test.each([
    [
      'restart',
      restartFromText,
      ['sometimes', 'always:x', 'always:-1', 'always:1.5', 'always:9007199254740993', 'onFailure'],
    ],
    ['jitter', jitterFromText, ['half', 'fulll']],
    ['admission policy', admissionFromText, ['dropIfRunning', 'wait']],
    ['task phase', phaseFromText, ['', 'done']],
  ] as const)('an unknown %s keeps the text it was', (what, read, texts) => {
    for (const text of texts) {
      expect(() => read(text)).toThrow(`unknown ${what}: ${text}`);
    }
  });

  test('words of jitter, admission and phase are read in any case', () => {
    expect(['', 'Default', ' full '].map(jitterFromText)).toEqual(['full', 'full', 'full']);
    expect(JITTER_POLICIES.map(jitterFromText)).toEqual(JITTER_POLICIES);
    expect(['', 'drop', 'Drop-If-Running'].map(admissionFromText)).toEqual(Array(3).fill('dropIfRunning'));
    expect(['queue', 'add', 'NEW'].map(admissionFromText)).toEqual(['queue', 'queue', 'queue']);
    for (const policy of ['dropIfRunning', 'replace', 'queue'] as const) {
      expect(admissionFromText(admissionToText(policy))).toBe(policy);
    }
    expect(phaseFromText(' Exhausted ')).toBe('exhausted');
    expect((['pending', 'running', 'timeout', 'canceled'] as const).map(isTerminal)).toEqual([
      false,
      false,
      true,
      true,
    ]);
  });

  test.each<[Json, string]>([
    ['never', 'r must be a JSON object'],
    [{ type: 'on-failure' }, 'r.type must be never, onFailure or always, got "on-failure"'],
    [{}, 'r.type must be a string'],
    [{ type: 'always', intervalMs: -1 }, 'r.intervalMs must be an integer >= 0, got -1'],
  ])('the restart %j is refused', (value, message) => {
    expect(() => parseRestart(value, 'r')).toThrow(message);
  });

  test.each<[JsonObject, string]>([
    [{ firstMs: 0 }, 'invalid model: b.firstMs: backoff first_ms must be greater than zero'],
    [{ maxMs: 999 }, 'invalid model: b.maxMs: backoff max_ms must be >= first_ms'],
    [{ factor: 0.99 }, 'invalid model: b.factor: backoff factor must be finite and >= 1.0'],
    [{ jitter: 'Full' }, 'b.jitter must be none, full, equal, decorrelated, got "Full"'],
    [{ firstMs: 1.5 }, 'b.firstMs must be an integer >= 0, got 1.5'],
    [{ factor: '2' }, 'b.factor must be a number, got "2"'],
  ])('a backoff with %j is refused', (change, message) => {
    expect(() => parseBackoff({ ...DEFAULT_BACKOFF, ...change }, 'b')).toThrow(message);
  });

  test('a backoff is taken at its bounds, and compared by the bits of its factor', () => {
    const least = { jitter: 'none', firstMs: 1, maxMs: 1, factor: 1 } as const;
    expect(parseBackoff(least, 'b')).toEqual(least);
    expect(sameBackoff(least, { ...least })).toBe(true);
    expect(sameBackoff(least, { ...least, factor: 1 + Number.EPSILON })).toBe(false);
  });

  test('the JSON of admission has its own words', () => {
    expect(parseAdmission('dropIfRunning', 'a')).toBe('dropIfRunning');
    expect(() => parseAdmission('drop', 'a')).toThrow('a must be dropIfRunning, replace, queue, got "drop"');
  });
});

describe('a kind', () => {
  test('has defaults for what it leaves out', () => {
    expect(kind(command())).toEqual({
      type: 'subprocess',
      mode: { type: 'command', command: 'ls', args: [] },
      env: [],
      cwd: null,
      failOnNonZero: true,
      extensions: {},
    });
    expect(kind({ wasm: { module: 'm.wasm' } })).toMatchObject({ type: 'wasm', args: [], env: [] });
    expect(kind({ container: { image: 'i', command: [] } })).toMatchObject({ command: null, args: [] });
    expect(kind('embedded')).toEqual({ type: 'embedded' });
  });

  test('resolves the words for runtimes', () => {
    expect((['bash', 'python', 'node'] as const).map(resolveRuntime)).toEqual([
      { command: 'bash', flag: '-c' },
      { command: 'python3', flag: '-c' },
      { command: 'node', flag: '-e' },
    ]);
    expect(resolveRuntime({ custom: { command: 'ruby', flag: '-e' } })).toEqual({
      command: 'ruby',
      flag: '-e',
    });
  });

  test('holds a script of 2 MiB, decoded, and not a byte more; a command has none', () => {
    const of = (bytes: number): Json => script({ body: Buffer.alloc(bytes, 'x').toString('base64') });
    const read = (value: Json): string => {
      const parsed = kind(value);
      return parsed.type === 'subprocess' ? scriptBody(parsed.mode) : '';
    };
    expect(read(of(MAX_SCRIPT_BYTES))).toHaveLength(MAX_SCRIPT_BYTES);
    expect(() => kind(of(MAX_SCRIPT_BYTES + 1))).toThrow('must be at most 2097152 bytes, it has 2097153');
    expect(read(script())).toBe('echo');
    expect(() => read(command())).toThrow('a command has no script body');
  });

  test.each<[Json, string]>([
    [
      command({ mode: { command: { command: ' ' } } }),
      'kind.subprocess.mode.command.command: subprocess command cannot be empty',
    ],
    [script({ body: '' }), 'kind.subprocess.mode.script.body: script body cannot be empty'],
    [script({ body: 'no base64' }), 'invalid base64 body'],
    [script({ body: 'ZWNobw' }), 'invalid base64 body'],
    [script({ body: '/w==' }), 'not valid UTF-8'],
    [
      script({ runtime: { custom: { command: ' ', flag: '-e' } } }),
      'custom.command: custom runtime command cannot be empty',
    ],
    [
      script({ runtime: { custom: { command: 'ruby', flag: ' ' } } }),
      'custom.flag: custom runtime flag cannot be empty',
    ],
    [script({ runtime: 'ruby' }), 'kind.subprocess.mode.script.runtime must be bash, python, node or'],
    [command({ mode: {} }), 'kind.subprocess.mode must have either command or script'],
    [command({ env: [{ key: 'A' }] }), 'kind.subprocess.env[0].value must be a string, got nothing'],
    [command({ failOnNonZero: 'no' }), 'kind.subprocess.failOnNonZero must be true or false'],
    [{ wasm: { module: '' } }, 'kind.wasm.module: wasm module path cannot be empty'],
    [{ container: { image: ' ' } }, 'kind.container.image: container image cannot be empty'],
    [{ container: { image: 'i', args: [1] } }, 'kind.container.args[0] must be a string, got 1'],
    ['none', 'kind must be a JSON object'],
    [{}, 'kind must be "embedded" or an object with one of subprocess, wasm, container'],
    [
      { shell: {} },
      'kind must be "embedded" or an object with one of subprocess, wasm, container, got shell',
    ],
    [{ wasm: { module: 'm' }, container: { image: 'i' } }, 'got wasm, container'],
    [{ constructor: {} }, 'got constructor'],
  ])('%j is refused', (value, message) => {
    expect(() => kind(value)).toThrow(message);
  });

  test.each<[JsonObject | 'embedded']>([
    ['embedded'],
    [command({ env: [{ key: 'A', value: '1' }], cwd: '/x', failOnNonZero: false, outputs: ['*.png'] })],
    [script({ args: ['a'], runtime: { custom: { command: 'ruby', flag: '-e' } } })],
    [{ wasm: { module: 'm', args: ['a'], env: [{ key: 'A', value: '' }], seed: 7 } }],
    [
      {
        container: {
          image: 'i',
          command: ['c'],
          args: ['a'],
          env: [{ key: 'A', value: '1' }],
          network: true,
        },
      },
    ],
    [{ container: { image: 'i' } }],
  ])('%j comes back as it was, what the model has no rules for included', (value) => {
    const json = taskKindToJson(kind(value));
    expect(json).toEqual(
      typeof value === 'object' && 'subprocess' in value
        ? { subprocess: { failOnNonZero: true, ...(value['subprocess'] as JsonObject) } }
        : value,
    );
    expect(kind(json)).toEqual(kind(value));
  });
});

describe('a task', () => {
  test('is read from JSON and written as it was', () => {
    expect(taskSpecToJson(parseTaskSpec(EXAMPLE, 'spec'))).toEqual(EXAMPLE);
  });

  test('omits what is empty, and sorts its labels', () => {
    const { runnerSelector: _selector, labels: _labels, ...bare } = EXAMPLE;
    expect(taskSpecToJson(parseTaskSpec(bare, 'spec'))).toEqual(bare);
    const labels = { b: '1', a: '2' };
    const written = taskSpecToJson(
      parseTaskSpec({ ...bare, labels, runnerSelector: {}, maxRetries: 0 }, 'spec'),
    );
    expect(written).toEqual({ ...bare, labels, runnerSelector: {}, maxRetries: 0 });
    expect(Object.keys(written['labels']!)).toEqual(['a', 'b']);
  });

  test.each(['slot', 'kind', 'timeout', 'restart', 'backoff', 'admission'])(
    'without %s is no JSON of a task',
    (name) => {
      const { [name]: _left, ...rest } = EXAMPLE;
      expect(() => parseTaskSpec(rest, 'spec')).toThrow(new RegExp(`^spec.${name} must be .*, got `));
    },
  );

  test('ignores members it does not know', () => {
    expect(parseTaskSpec({ ...EXAMPLE, generation: 1 }, 'spec')).toEqual(parseTaskSpec(EXAMPLE, 'spec'));
  });

  test.each<[JsonObject, string]>([
    [{ slot: '' }, 'invalid model: spec.slot: slot cannot be empty'],
    [{ slot: 'a/b' }, 'invalid model: spec.slot: slot must be letters'],
    [{ timeout: 0 }, 'invalid model: spec.timeout: timeout must be greater than zero'],
    [{ timeout: -1 }, 'spec.timeout must be an integer >= 0, got -1'],
    [{ backoff: { ...DEFAULT_BACKOFF, firstMs: 0 } }, 'spec.backoff.firstMs: backoff first_ms'],
    [
      { runnerSelector: { matchExpressions: [{ key: 'K', operator: 'In' }] } },
      'spec.runnerSelector.matchExpressions[0]',
    ],
    [{ kind: { wasm: { module: '' } } }, 'spec.kind.wasm.module: wasm module path'],
    [{ maxRetries: 1.5 }, 'spec.maxRetries must be an integer >= 0, got 1.5'],
  ])('with %j is refused', (change, message) => {
    expect(() => parseTaskSpec({ ...EXAMPLE, ...change }, 'spec')).toThrow(message);
  });

  test('that is built has the defaults of its policies, and obeys the same rules', () => {
    const parsed = kind(command());
    expect(taskSpec({ slot: 's', kind: parsed, timeoutMs: 1 })).toEqual({
      slot: 's',
      kind: parsed,
      timeoutMs: 1,
      restart: { type: 'never' },
      backoff: { jitter: 'full', firstMs: 1_000, maxMs: 30_000, factor: 2 },
      admission: 'dropIfRunning',
      runnerSelector: null,
      labels: {},
      maxRetries: null,
    });
    expect(() => taskSpec({ slot: 's', kind: parsed, timeoutMs: 0 })).toThrow(
      'timeout must be greater than zero',
    );
    expect(() => taskSpec({ slot: '..', kind: parsed, timeoutMs: 1 })).toThrow(/slot must be/);
  });

  test('that is embedded can be built, and not be submitted', () => {
    const embedded = taskSpec({ slot: 's', kind: { type: 'embedded' }, timeoutMs: 1 });
    expect(() => validateForSubmit(embedded)).toThrow(
      /^invalid model: .*TaskKind::Embedded.*submit_with_task/,
    );
    validateForSubmit(taskSpec({ slot: 's', kind: kind(command()), timeoutMs: 1 }));
  });

  test('comes back the same from JSON, whatever is in it', () => {
    const text = fc.string({ maxLength: 5 });
    const env = fc.array(fc.record({ key: text, value: text }), { maxLength: 3 });
    const kinds: fc.Arbitrary<TaskKind> = fc.oneof(
      fc.record({
        type: fc.constant('subprocess' as const),
        mode: fc.record({
          type: fc.constant('command' as const),
          command: fc.constantFrom('a', 'b c'),
          args: fc.array(text, { maxLength: 2 }),
        }),
        env,
        cwd: fc.option(text),
        failOnNonZero: fc.boolean(),
        extensions: fc.constantFrom<JsonObject>({}, { outputs: ['a'] }),
      }),
      fc.constant({ type: 'embedded' as const }),
    );
    const specs = fc.record({
      slot: fc.stringMatching(/^[a-z0-9]{1,64}$/),
      kind: kinds,
      timeoutMs: fc.integer({ min: 1 }),
      restart: fc.constantFrom({ type: 'never' as const }, { type: 'always' as const, intervalMs: 5 }),
      backoff: fc.record({
        jitter: fc.constantFrom(...JITTER_POLICIES),
        firstMs: fc.integer({ min: 1, max: 10 }),
        maxMs: fc.integer({ min: 10 }),
        factor: fc.double({ min: 1, max: 100, noNaN: true }),
      }),
      admission: fc.constantFrom('dropIfRunning' as const, 'replace' as const, 'queue' as const),
      maxRetries: fc.option(fc.nat()),
      labels: fc.dictionary(text, text),
    });
    fc.assert(
      fc.property(specs, (given) => {
        const spec = taskSpec(given);
        const json = JSON.parse(JSON.stringify(taskSpecToJson(spec))) as Json;
        expect(parseTaskSpec(json, 'spec')).toEqual(spec);
      }),
      { numRuns: 200 },
    );
  });
});

test('every kind has a symbolic name', () => {
  expect(TASK_KINDS).toEqual(['subprocess', 'wasm', 'container', 'embedded']);
});
