import { expect, test } from 'vitest';
import { AWAY_AFTER_MS } from './explain.ts';
import { boundedCapabilities, queueReport } from './queue-report.ts';
import type { NodeRecord } from './records.ts';
import type { QueueStanding } from './store.ts';

const NOW = Date.parse('2025-06-01T12:00:00.000Z');
const ago = (ms: number): string => new Date(NOW - ms).toISOString();

function node(members: Partial<NodeRecord>): NodeRecord {
  return {
    id: 'id',
    name: 'node',
    mode: 'public',
    organization_id: 'org',
    wallet: '0x1',
    capabilities: ['/a/v1'],
    labels: {},
    version: null,
    max_concurrency: 2,
    created_at: ago(1e6),
    registered_at: ago(1e6),
    last_seen_at: ago(1000),
    active_leases: 0,
    ...members,
  };
}

function queue(members: Partial<QueueStanding>): QueueStanding {
  return {
    capability: '/a/v1',
    filters: {},
    mode: 'public',
    organizationId: 'org',
    ready: 1,
    limited: 0,
    blocked: 0,
    delayed: 0,
    held: 0,
    oldestReadyAgeMs: 500,
    ...members,
  };
}

test('a node that says what it has counts as many slots as would fit', () => {
  const nodes = [
    node({
      id: 'a',
      max_concurrency: 1000,
      resources: { cpu: 8, memory: 100 },
      resources_in_use: { cpu: 1.5 },
    }),
    node({ id: 'b', max_concurrency: 3, resources: { cpu: 64 }, resources_in_use: {}, active_leases: 1 }),
    node({ id: 'c', max_concurrency: 5 }),
  ];
  const standings = [queue({}), queue({ resources: { cpu: 2, memory: 10 }, limited: 1 })];
  const { queues, capabilities } = queueReport(standings, nodes, NOW);
  expect(queues).toMatchObject([
    { nodes: 3, slots: 8 + 3 + 5, free_slots: 6 + 2 + 5 },
    { nodes: 2, slots: 4 + 5, free_slots: 3 + 5, limited: 1, resources: { cpu: 2, memory: 10 } },
  ]);
  expect(capabilities).toMatchObject([{ slots: 16, ready: 2, limited: 1 }]);
});

test('a queue is told with the nodes that may take from it and are there', () => {
  const nodes = [
    node({ labels: { gpu: 'yes' }, active_leases: 1 }),
    node({}),
    node({ last_seen_at: ago(AWAY_AFTER_MS) }),
    node({ last_seen_at: ago(AWAY_AFTER_MS + 1), max_concurrency: 50 }),
    // It holds a lease, so it is there however long ago it asked.
    node({ last_seen_at: ago(AWAY_AFTER_MS * 9), active_leases: 2 }),
    node({ capabilities: ['/b/v1'] }),
    node({ registered_at: null, capabilities: [] }),
  ];
  const report = queueReport(
    [queue({ ready: 3, held: 3 }), queue({ filters: { gpu: 'yes' }, blocked: 4, oldestReadyAgeMs: 9000 })],
    nodes,
    NOW,
  );
  expect(report.queues).toEqual([
    {
      capability: '/a/v1',
      capability_filters: {},
      mode: 'public',
      organization_id: 'org',
      ready: 3,
      limited: 0,
      blocked: 0,
      delayed: 0,
      running: 3,
      oldest_age_ms: 500,
      nodes: 4,
      nodes_away: 1,
      slots: 8,
      free_slots: 5,
    },
    expect.objectContaining({
      capability_filters: { gpu: 'yes' },
      blocked: 4,
      nodes: 1,
      slots: 2,
      free_slots: 1,
    }),
  ]);
  expect(report.capabilities).toEqual([
    {
      capability: '/a/v1',
      ready: 4,
      limited: 0,
      blocked: 4,
      delayed: 0,
      running: 3,
      oldest_age_ms: 9000,
      nodes: 4,
      nodes_away: 1,
      slots: 8,
      free_slots: 5,
    },
    expect.objectContaining({ capability: '/b/v1', ready: 0, oldest_age_ms: null, nodes: 1 }),
  ]);
});

test('metrics name what nodes offer, a hundred at most; what only submitters name is summed up', () => {
  const offered = Array.from({ length: 101 }, (_, index) => `/n${String(index).padStart(3, '0')}/v1`);
  const nodes = [node({ capabilities: offered })];
  const report = queueReport(
    [
      queue({ capability: '/wanted/v1', ready: 5, oldestReadyAgeMs: 7000 }),
      queue({ capability: '/typo/v1', ready: 2, oldestReadyAgeMs: null }),
      queue({ capability: '/n100/v1', ready: 1, oldestReadyAgeMs: 8000 }),
      queue({ capability: '/n099/v1', ready: 9 }),
    ],
    nodes,
    NOW,
  );
  const entries = boundedCapabilities(report, nodes);
  expect(entries).toHaveLength(101);
  expect(entries.at(-1)).toMatchObject({ capability: 'other', ready: 8, oldest_age_ms: 8000, nodes: 0 });
  expect(entries.at(-2)).toMatchObject({ capability: '/n099/v1', ready: 9, nodes: 1 });
});

test('nodes are found by every sort of filter, whatever labels they have', () => {
  const nodes = [
    node({ id: 'a', labels: { zone: 'x', host: 'h1' } }),
    node({ id: 'b', labels: { zone: 'x', host: 'h2' }, capabilities: ['/a/v1', '/b/v1'] }),
    node({ id: 'c', labels: { zone: 'y' }, mode: 'dedicated' }),
    node({ id: 'd', labels: {}, organization_id: 'other' }),
  ];
  const count = (members: Partial<QueueStanding>): number =>
    queueReport([queue(members)], nodes, NOW).queues[0]!.nodes;
  expect(count({})).toBe(4);
  expect(count({ organizationId: 'other' })).toBe(3);
  expect(count({ mode: 'dedicated' })).toBe(1);
  expect(count({ capability: '/b/v1' })).toBe(1);
  expect(count({ capability: '/c/v1' })).toBe(0);
  expect(count({ filters: { zone: 'x' } })).toBe(2);
  expect(count({ filters: { zone: 'x', host: 'h2' } })).toBe(1);
  expect(count({ filters: { zone: 'y', host: 'h2' } })).toBe(0);
  expect(count({ filters: { toString: 'x' } })).toBe(0);
  expect(count({ capability: '/b/v1', filters: { zone: 'x' } })).toBe(1);
});

test('a thousand queues and a thousand nodes are looked at by the label that few nodes have', () => {
  let looks = 0;
  const nodes = Array.from({ length: 1000 }, (_, index) =>
    Object.defineProperty(node({ id: `${index}`, labels: { host: `h${index}` } }), 'mode', {
      enumerable: true,
      get: () => {
        looks += 1;
        return 'public';
      },
    }),
  );
  const standings = Array.from({ length: 1000 }, (_, index) => queue({ filters: { host: `h${index}` } }));
  const { queues } = queueReport([...standings, queue({})], nodes, NOW);
  expect(queues.map(({ nodes: able }) => able)).toEqual([...standings.map(() => 1), 1000]);
  expect(looks).toBeLessThan(10_000);
});
