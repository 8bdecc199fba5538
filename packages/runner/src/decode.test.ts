import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  arrayOf,
  counter,
  integer,
  membersInText,
  optional,
  parseJson,
  parseLease,
  parseLeaseJson,
  parseTaskSpec,
  string,
  timestampMs,
} from './decode.ts';
import { MillraceError } from './errors.ts';
import type { LeaseEnvelope, TaskSpec } from './lease.ts';

const ID = '2f9f3c62-51c1-4b7e-8f0a-7f4a1f0e9d11';
const DOMAIN = '9c0c6c0e-8f63-4c0b-9a9b-0f5f6f1f2f3f';

const TASK_MEMBERS = [
  'id',
  'job_id',
  'capability',
  'capability_filters',
  'inputs_cids',
  'outputs_prefix',
  'label',
  'stage',
  'meta',
  'priority',
  'attempts',
  'max_attempts',
  'deps_remaining',
  'status',
  'mode',
  'organization_filter',
  'billing_units',
  'estimated_credit_cost',
  'debited_amount',
  'debited_at',
  'lease_expires_at',
] as const satisfies readonly (keyof TaskSpec)[];

const LEASE_MEMBERS = [
  'access_token',
  'access_token_expires_at',
  'lease_expires_at',
  'cancel',
  'status',
  'domain_id',
  'domain_server_url',
  'task',
] as const satisfies readonly (keyof LeaseEnvelope)[];

const smallest = { task: { id: ID, capability: '/examples/hello/v1' } };

const full = {
  access_token: 'header.payload.signature',
  access_token_expires_at: '2026-05-01T10:00:00.123456Z',
  lease_expires_at: '2026-05-01T12:00:00+02:00',
  cancel: true,
  status: 'leased',
  domain_id: DOMAIN,
  domain_server_url: 'https://domain.example/prefix',
  task: {
    id: ID,
    job_id: DOMAIN,
    capability: '/examples/hello/v1',
    capability_filters: { gpu: 'yes' },
    inputs_cids: ['a', 'https://domain.example/api/v1/domains/x/data/y'],
    outputs_prefix: 'out',
    label: 'first',
    stage: 'prepare',
    meta: { deep: [1, null, { ok: true }] },
    priority: -5,
    attempts: 1,
    max_attempts: 3,
    deps_remaining: 0,
    status: 'leased',
    mode: 'public',
    organization_filter: 'own',
    billing_units: '0.002',
    estimated_credit_cost: '12',
    debited_amount: '0',
    debited_at: '2026-05-01T10:00:00Z',
    lease_expires_at: '2026-05-01T10:00:00Z',
  },
};

/** The lease with one member of it, or of its task, replaced. */
function lease(member: string, value: unknown): unknown {
  const [first, second] = member.split('.');
  return second === undefined
    ? { ...full, [member]: value }
    : { ...full, [first!]: { ...full.task, [second]: value } };
}

function refused(run: () => unknown): MillraceError {
  try {
    run();
  } catch (error) {
    if (MillraceError.is(error)) {
      expect(error.code).toBe('invalid_argument');
      return error;
    }
    throw error;
  }
  throw new Error('expected a MillraceError, but nothing was thrown');
}

describe('a lease', () => {
  test('with every member is taken as it is', () => {
    expect(parseLease(full)).toEqual(full);
    expect(parseLeaseJson(JSON.stringify(full))).toEqual(full);
  });

  test('needs nothing but task, task.id and task.capability; absent members become null or their default', () => {
    const parsed = parseLease(smallest);
    expect(parsed.cancel).toBe(false);
    expect(parsed.task.inputs_cids).toEqual([]);
    for (const member of LEASE_MEMBERS) {
      if (member !== 'cancel' && member !== 'task') expect(parsed[member]).toBeNull();
    }
    for (const member of TASK_MEMBERS) {
      if (!['id', 'capability', 'inputs_cids'].includes(member)) expect(parsed.task[member]).toBeNull();
    }
  });

  test.each([
    [{}],
    [{ task: null }],
    [{ task: [] }],
    [{ task: { capability: '/c' } }],
    [{ task: { id: null, capability: '/c' } }],
    [{ task: { id: ID } }],
    [{ task: { id: ID, capability: null } }],
    [{ task: { id: ID, capability: 1 } }],
    [[smallest]],
    ['lease'],
    [null],
    [undefined],
  ])('is refused when it lacks one of them or is no object: %j', (value) => {
    refused(() => parseLease(value));
  });

  test.each([...LEASE_MEMBERS, ...TASK_MEMBERS.map((member) => `task.${member}`)])(
    '%s: absent and null are the same where the rules say so',
    (member) => {
      const must = ['task', 'task.id', 'task.capability', 'cancel', 'task.inputs_cids'];
      if (must.includes(member)) refused(() => parseLease(lease(member, null)));
      else expect(parseLease(lease(member, null))).toEqual(parseLease(lease(member, undefined)));
    },
  );

  test('keeps every member through JSON and back, absent ones as null', () => {
    const text = JSON.stringify(parseLease(smallest));
    const again = JSON.parse(text) as { task: object };
    expect(Object.keys(again)).toEqual([...LEASE_MEMBERS]);
    expect(Object.keys(again.task)).toEqual([...TASK_MEMBERS]);
    expect(text).toContain('"billing_units":null');
    expect(parseLeaseJson(text)).toEqual(parseLease(smallest));
    expect(parseLeaseJson(JSON.stringify(parseLease(full)))).toEqual(parseLease(full));
  });

  test('serialises to what it was parsed from, whatever its members are', () => {
    const orNull = <T>(arbitrary: fc.Arbitrary<T>): fc.Arbitrary<T | null> =>
      fc.option(arbitrary, { nil: null });
    const time = fc
      .date({ min: new Date('1970-01-01'), max: new Date('9999-12-31'), noInvalidDate: true })
      .map((date) => date.toISOString());
    const anyLease = fc.record({
      access_token: orNull(fc.string()),
      access_token_expires_at: orNull(time),
      lease_expires_at: orNull(time),
      cancel: fc.boolean(),
      status: orNull(fc.string()),
      domain_id: orNull(fc.uuid()),
      domain_server_url: orNull(fc.webUrl()),
      task: fc.record({
        id: fc.uuid(),
        job_id: orNull(fc.uuid()),
        capability: fc.string(),
        capability_filters: fc.jsonValue({ noUnicodeString: false }),
        inputs_cids: fc.array(fc.string()),
        outputs_prefix: orNull(fc.string()),
        label: orNull(fc.string()),
        stage: orNull(fc.string()),
        meta: fc.jsonValue({ noUnicodeString: false }),
        priority: orNull(fc.maxSafeInteger()),
        attempts: orNull(fc.maxSafeNat()),
        max_attempts: orNull(fc.maxSafeNat()),
        deps_remaining: orNull(fc.maxSafeNat()),
        status: orNull(fc.string()),
        mode: orNull(fc.string()),
        organization_filter: orNull(fc.string()),
        billing_units: orNull(fc.string()),
        estimated_credit_cost: orNull(fc.string()),
        debited_amount: orNull(fc.string()),
        debited_at: orNull(time),
        lease_expires_at: orNull(time),
      }),
    });
    fc.assert(
      fc.property(anyLease, (value) => {
        const text = JSON.stringify(value);
        expect(JSON.stringify(parseLeaseJson(text))).toBe(text);
      }),
    );
  });

  test('ignores unknown members, also those named like members of every object, and drops them', () => {
    const text = `{"toString":1,"toString":2,"__proto__":{"cancel":true},"":{"cancel":1,"cancel":2},"x":[{"y":1,"y":2}],
      "task":{"constructor":1,"constructor":2,"id":"${ID}","capability":"/c","meta":{"a":1,"a":2}}}`;
    const parsed = parseLeaseJson(text);
    expect(parsed.cancel).toBe(false);
    expect(Object.keys(parsed)).toEqual([...LEASE_MEMBERS]);
    expect(parsed.task.meta).toEqual({ a: 2 });
  });

  test.each([
    [`{"task":{"id":"${ID}","capability":"/c"},"cancel":false,"cancel":false}`, 'lease.cancel'],
    [`{"task":{"id":"${ID}","capability":"/c"},"task":{"id":"${ID}","capability":"/c"}}`, 'lease.task'],
    [`{"task":{"id":"${ID}","capability":"/c","meta":[{"meta":1}],"meta":2}}`, 'lease.task.meta'],
    [`{"task":{"id":"${ID}","capability":"/c","\\u0069d":"${ID}"}}`, 'lease.task.id'],
  ])('with a known member given twice is refused: %s', (text, path) => {
    expect(refused(() => parseLeaseJson(text)).message).toBe(`${path} must be given once, got it twice`);
  });

  test('a quote, brace or backslash inside a string is not taken for structure', () => {
    const meta = { 'a"},{"id': '\\"id\\\\', '\\': ['"id":1', '{', '}\\'], id: 'own' };
    const text = JSON.stringify({ task: { id: ID, capability: '/c', meta, label: '","id":"' } });
    expect(parseLeaseJson(text).task.meta).toEqual(meta);
  });

  test('text that is not JSON is refused without repeating it', () => {
    const error = refused(() => parseLeaseJson('{"access_token":"very-secret-token",}'));
    expect(error.message).toMatch(/lease must be valid JSON, got 37 characters/);
    expect(JSON.stringify(error) + error.message + String(error.cause)).not.toContain('secret');
  });
});

describe('errors', () => {
  test('name the member, the rule and the value', () => {
    expect(refused(() => parseLease(lease('task.attempts', -1))).message).toBe(
      'lease.task.attempts must be an integer >= 0, got -1',
    );
    expect(refused(() => parseLease(lease('task.inputs_cids', ['a', 7]))).message).toBe(
      'lease.task.inputs_cids[1] must be a string, got 7',
    );
    expect(refused(() => parseTaskSpec({ id: 'x' }, 'reply.task')).message).toBe(
      'reply.task.id must be a UUID, got "x"',
    );
  });

  test('cut long values', () => {
    const { message } = refused(() => parseLease(lease('domain_id', 'x'.repeat(10_000))));
    expect(message.length).toBeLessThan(200);
    expect(message).toContain('...');
  });

  test('never show a token, wherever it stands', () => {
    const token = 'eyJhbGciOiJFUzI1NiJ9';
    for (const value of [
      lease('access_token', { token }),
      lease('access_token', [token]),
      lease('access_token', 12_345_678),
      [{ access_token: token }],
      token,
    ]) {
      const { message } = refused(() => parseLease(value));
      expect(message).not.toContain(token);
      expect(message).not.toContain('12345678');
    }
  });
});

describe('UUIDs', () => {
  const bare = ID.replaceAll('-', '');

  test.each([ID, ID.toUpperCase(), bare, bare.toUpperCase(), `{${ID}}`, `urn:uuid:${ID}`])(
    '%s is read as the hyphenated lower case',
    (text) => {
      expect(parseLease(lease('domain_id', text)).domain_id).toBe(ID);
      expect(parseLease(lease('task.id', text)).task.id).toBe(ID);
    },
  );

  test.each([
    '',
    ' ',
    ID.slice(1),
    `${ID}0`,
    ` ${ID}`,
    `${ID}\n`,
    `{${ID}`,
    `${ID}}`,
    `{${bare}}`,
    `urn:uuid:${bare}`,
    `{urn:uuid:${ID}}`,
    `urn:uuid:{${ID}}`,
    ID.replace('-', ''),
    ID.replace('2', 'g'),
    ID.replaceAll('-', '_'),
    0,
    true,
    [ID],
  ])('%j is refused', (value) => {
    refused(() => parseLease(lease('domain_id', value)));
    refused(() => parseLease(lease('task.job_id', value)));
  });
});

describe('timestamps', () => {
  test.each([
    ['2026-05-01T10:00:00Z', Date.UTC(2026, 4, 1, 10)],
    ['2026-05-01t10:00:00z', Date.UTC(2026, 4, 1, 10)],
    ['2026-05-01 10:00:00Z', Date.UTC(2026, 4, 1, 10)],
    ['2026-05-01T10:00:00.1Z', Date.UTC(2026, 4, 1, 10, 0, 0, 100)],
    ['2026-05-01T10:00:00.123456789Z', Date.UTC(2026, 4, 1, 10, 0, 0, 123)],
    ['2026-05-01T12:30:00+02:30', Date.UTC(2026, 4, 1, 10)],
    ['2026-05-01T10:00:00-00:00', Date.UTC(2026, 4, 1, 10)],
    ['2024-02-29T23:59:59Z', Date.UTC(2024, 1, 29, 23, 59, 59)],
    ['2000-02-29T00:00:00Z', Date.UTC(2000, 1, 29)],
    ['2016-12-31T23:59:60Z', Date.UTC(2017, 0, 1)],
    ['0001-01-01T00:00:00Z', -62_135_596_800_000],
  ])('%s is read and kept as it was written', (text, ms) => {
    expect(timestampMs(text)).toBe(ms);
    expect(parseLease(lease('lease_expires_at', text)).lease_expires_at).toBe(text);
    expect(parseLease(lease('task.debited_at', text)).task.debited_at).toBe(text);
  });

  test.each([
    '',
    '2026-05-01',
    '2026-05-01T10:00:00',
    '2026-05-01T10:00Z',
    '2026-05-01T10:00:00+0200',
    '2026-05-01T10:00:00.Z',
    '2026-02-29T00:00:00Z',
    '2026-02-30T00:00:00Z',
    '1900-02-29T00:00:00Z',
    '2026-04-31T00:00:00Z',
    '2026-13-01T00:00:00Z',
    '2026-00-01T00:00:00Z',
    '2026-01-00T00:00:00Z',
    '2026-01-01T24:00:00Z',
    '2026-01-01T10:60:00Z',
    '2026-01-01T10:00:61Z',
    '2026-01-01T10:00:00+25:00',
    '+002026-01-01T00:00:00Z',
    'Fri, 01 May 2026 10:00:00 GMT',
    1_777_629_600,
    1_777_629_600_000,
    true,
  ])('%j is refused', (value) => {
    refused(() => parseLease(lease('lease_expires_at', value)));
    refused(() => parseLease(lease('access_token_expires_at', value)));
    refused(() => parseLease(lease('task.lease_expires_at', value)));
  });

  test('every instant JavaScript can write in RFC 3339 is read back exactly', () => {
    const range = { min: new Date('0000-01-01T00:00:00Z'), max: new Date('9999-12-31T23:59:59.999Z') };
    fc.assert(
      fc.property(fc.date({ ...range, noInvalidDate: true }), (date) => {
        expect(timestampMs(date.toISOString())).toBe(date.getTime());
      }),
    );
  });
});

describe('URLs', () => {
  test.each(['http://127.0.0.1:7070', 'https://domain.example/with/prefix?x=1', 'HTTP://Example.com'])(
    '%s is kept as it was written',
    (text) => {
      expect(parseLease(lease('domain_server_url', text)).domain_server_url).toBe(text);
    },
  );

  test('white space around one is dropped, as a URL parser does', () => {
    expect(parseLease(lease('domain_server_url', ' http://a.example\n')).domain_server_url).toBe(
      'http://a.example',
    );
  });

  test.each(['', '/relative', 'example.com/x', '//example.com', 'http://', 'http://a:99999', 7, {}])(
    '%j is refused',
    (value) => {
      refused(() => parseLease(lease('domain_server_url', value)));
    },
  );
});

describe('numbers', () => {
  test.each(['attempts', 'max_attempts', 'deps_remaining'])('task.%s is an integer >= 0', (member) => {
    for (const value of [0, 1, Number.MAX_SAFE_INTEGER]) {
      expect(parseLease(lease(`task.${member}`, value)).task).toMatchObject({ [member]: value });
    }
    for (const value of [-1, 1.5, '1', true, [], Number.MAX_SAFE_INTEGER + 1]) {
      refused(() => parseLease(lease(`task.${member}`, value)));
    }
  });

  test('task.priority is a signed 64-bit integer', () => {
    for (const text of ['-1', '0', '9223372036854775807', '-9223372036854775808']) {
      const parsed = parseLeaseJson(`{"task":{"id":"${ID}","capability":"/c","priority":${text}}}`);
      expect(parsed.task.priority).toBe(Number(text));
    }
    for (const value of [0.5, '1', 1e19, -1e19]) refused(() => parseLease(lease('task.priority', value)));
  });

  test.each(['1.0', '1e2', '-0.0', '10E-1'])('the spelling %s is refused for an integer', (spelling) => {
    for (const member of ['priority', 'attempts', 'max_attempts', 'deps_remaining']) {
      const text = `{"task":{"id":"${ID}","capability":"/c","${member}": ${spelling}}}`;
      expect(refused(() => parseLeaseJson(text)).message).toBe(
        `lease.task.${member} must be an integer, got ${spelling}`,
      );
    }
  });

  test('any spelling is fine in meta', () => {
    const text = `{"attempts":1.0,"task":{"id":"${ID}","capability":"/c","meta":{"attempts":1.0},"x":1.0}}`;
    expect(parseLeaseJson(text).task.meta).toEqual({ attempts: 1 });
  });

  test.each(['billing_units', 'estimated_credit_cost', 'debited_amount'])('task.%s is text', (member) => {
    expect(parseLease(lease(`task.${member}`, '0.002')).task).toMatchObject({ [member]: '0.002' });
    refused(() => parseLease(lease(`task.${member}`, 0.002)));
  });
});

describe('other members', () => {
  test('capability_filters and meta take any JSON', () => {
    fc.assert(
      fc.property(fc.jsonValue(), (value) => {
        const { task } = parseLease(lease('task.meta', value));
        expect(task.meta).toEqual(value);
        expect(parseLease(lease('task.capability_filters', value)).task.capability_filters).toEqual(value);
      }),
    );
  });

  test.each(['task.outputs_prefix', 'task.label', 'task.stage', 'task.status', 'task.mode', 'status'])(
    '%s is text',
    (member) => {
      refused(() => parseLease(lease(member, 1)));
      refused(() => parseLease(lease(member, {})));
      parseLease(lease(member, ''));
    },
  );

  test('inputs_cids is an array of text', () => {
    for (const value of ['a', {}, [1], [null], [['a']]]) {
      refused(() => parseLease(lease('task.inputs_cids', value)));
    }
  });

  test('cancel is true or false', () => {
    for (const value of [0, 1, 'true', null]) refused(() => parseLease(lease('cancel', value)));
  });
});

describe('building blocks', () => {
  test('optional, arrayOf and the number rules compose', () => {
    const decode = optional(arrayOf(optional(counter)));
    expect(decode([1, null], 'x')).toEqual([1, null]);
    expect(decode(undefined, 'x')).toBeNull();
    expect(refused(() => decode([1, -1], 'x')).message).toBe('x[1] must be an integer >= 0, got -1');
    expect(integer(-3, 'x')).toBe(-3);
    expect(refused(() => integer(2 ** 53, 'x')).message).toBe('x must be an integer, got 9007199254740992');
    expect(refused(() => string(undefined, 'x')).message).toBe('x must be a string, got nothing');
  });

  test('parseJson gives what JSON.parse gives', () => {
    fc.assert(
      fc.property(fc.json(), (text) => {
        expect(parseJson(text, 'x')).toEqual(JSON.parse(text));
      }),
    );
  });

  test('membersInText finds exactly the members of the outer levels of any JSON', () => {
    const walk = (value: unknown, parent: readonly string[], depth: number): string[] => {
      if (depth === 0 || typeof value !== 'object' || value === null) return [];
      if (Array.isArray(value)) return value.flatMap((item) => walk(item, [...parent, '[]'], depth - 1));
      return Object.entries(value).flatMap(([key, member]) => [
        JSON.stringify([parent, key, typeof member === 'number' ? member : null]),
        ...walk(member, [...parent, key], depth - 1),
      ]);
    };
    fc.assert(
      fc.property(
        fc.jsonValue(),
        fc.constantFrom(0, 2),
        fc.integer({ min: 1, max: 4 }),
        (value, space, depth) => {
          const found = [...membersInText(JSON.stringify(value, null, space), depth)].map((member) =>
            JSON.stringify([
              member.parent,
              member.key,
              member.number === null ? null : Number(member.number),
            ]),
          );
          expect(found).toEqual(walk(JSON.parse(JSON.stringify(value)), [], depth));
        },
      ),
    );
  });

  test('membersInText takes a string of several megabytes', () => {
    const text = JSON.stringify({ a: '\\"'.repeat(2_000_000), b: 1 });
    expect([...membersInText(text, 1)].map((member) => member.key)).toEqual(['a', 'b']);
  });
});
