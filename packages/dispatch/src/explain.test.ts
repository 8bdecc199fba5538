import { describe, expect, test } from 'vitest';
import {
  AWAY_AFTER_MS,
  explainJob,
  explainTask,
  nearestNames,
  type Reason,
  type ReasonCode,
} from './explain.ts';
import type { NodeWait } from './node-wait.ts';
import type { JobDetail, JobRecord, NodeRecord, ReceiptRecord, TaskRecord, TaskStatus } from './records.ts';
import type { TaskStanding } from './store.ts';

const NOW = Date.parse('2025-06-01T12:00:00.000Z');
const at = (ms: number): string => new Date(NOW + ms).toISOString();

function task(members: Partial<TaskRecord> = {}): TaskRecord {
  return {
    id: 'task-1',
    job_id: 'job-1',
    label: 'render',
    stage: 'render',
    capability: '/render/tiles/v1',
    capability_filters: {},
    status: 'queued',
    deps_remaining: 0,
    priority: 0,
    inputs_cids: [],
    outputs_prefix: null,
    organization_id: 'org',
    attempts: 0,
    max_attempts: 3,
    lease_expires_at: null,
    reserved_by: null,
    meta: {},
    cancel_requested_at: null,
    last_heartbeat_at: null,
    created_at: at(-60_000),
    updated_at: at(-30_000),
    mode: 'public',
    billing_units: null,
    estimated_credit_cost: null,
    debited_amount: null,
    debited_at: null,
    reason: null,
    not_before: null,
    output_cids: [],
    node_faults: 0,
    deadline_at: null,
    ...members,
  };
}

function node(name: string, members: Partial<NodeRecord> = {}): NodeRecord {
  return {
    id: `id-${name}`,
    name,
    mode: 'public',
    organization_id: 'org',
    wallet: '0x1',
    capabilities: ['/render/tiles/v1'],
    labels: {},
    version: '1.0.0',
    max_concurrency: 2,
    created_at: at(-1e6),
    registered_at: at(-1e6),
    last_seen_at: at(-1_000),
    active_leases: 0,
    ...members,
  };
}

function receipt(members: Partial<ReceiptRecord>): ReceiptRecord {
  return {
    id: 'lease',
    job_id: 'job-1',
    task_id: 'task-1',
    node_id: 'id-a',
    outputs: [],
    meta: null,
    created_at: at(-30_000),
    outcome: 'failed',
    reason: null,
    leased_at: at(-50_000),
    ...members,
  };
}

function detail(
  tasks: readonly TaskRecord[],
  members: { readonly job?: Partial<JobRecord>; readonly receipts?: readonly ReceiptRecord[] } = {},
): JobDetail {
  const summary: Record<TaskStatus, number> = {
    queued: 0,
    leased: 0,
    running: 0,
    completed: 0,
    failed: 0,
    canceled: 0,
  };
  for (const { status } of tasks) summary[status] += 1;
  return {
    job: {
      id: 'job-1',
      label: 'map',
      domain_id: 'domain',
      status: 'running',
      priority: 0,
      created_at: at(-60_000),
      updated_at: at(-1_000),
      organization_id: 'org',
      meta: {},
      credit_lock_id: null,
      credit_lock_amount: null,
      credit_locked_at: null,
      credit_released_at: null,
      cancel_requested_at: null,
      deadline_at: null,
      edges: [],
      ...members.job,
    },
    tasks_summary: summary,
    tasks,
    receipts: members.receipts ?? [],
  };
}

function standing(members: Partial<TaskStanding> = {}): TaskStanding {
  return {
    jobId: 'job-1',
    domainId: 'domain',
    attempts: 0,
    leasedAt: null,
    final: false,
    ahead: null,
    ...members,
  };
}

interface Case {
  readonly title: string;
  readonly task: Partial<TaskRecord>;
  readonly others?: readonly TaskRecord[];
  readonly nodes?: readonly NodeRecord[];
  readonly job?: Partial<JobRecord>;
  readonly receipts?: readonly ReceiptRecord[];
  readonly standing?: Partial<TaskStanding>;
  readonly wait?: NodeWait;
  /** Codes and sentences, in order. */
  readonly reasons: readonly (readonly [ReasonCode, string])[];
}

const OFFERS_OTHER = node('a', {
  capabilities: ['/render/tiles/v2', '/render/tile/v1', '/something/else/entirely/v1'],
});

const CASES: readonly Case[] = [
  {
    title: 'nobody has ever registered',
    task: {},
    nodes: [node('new', { registered_at: null, capabilities: [] })],
    reasons: [
      [
        'no_node_registered',
        'no node has ever registered here; "millrace node start" runs one, "millrace nodes add" makes its credentials',
      ],
    ],
  },
  {
    title: 'no node has the capability: the nearest names',
    task: {},
    nodes: [OFFERS_OTHER],
    reasons: [
      [
        'no_node_with_capability',
        'no node offers /render/tiles/v1; the nearest offered names are /render/tile/v1, /render/tiles/v2',
      ],
    ],
  },
  {
    title: 'no node has the capability, nor one like it',
    task: { capability: '/x/v1' },
    nodes: [node('a', { capabilities: ['/something/else/entirely/v1'] })],
    reasons: [['no_node_with_capability', 'no node offers /x/v1']],
  },
  {
    title: 'a label differs, or is not there',
    task: { capability_filters: { gpu: 'a100', zone: 'eu' } },
    nodes: [node('a', { labels: { gpu: 't4', zone: 'eu' } }), node('b', { labels: { gpu: 'a100' } })],
    reasons: [
      ['label_differs', 'the task wants gpu=a100, zone=eu, but nodes a (gpu=t4) and b (no label zone)'],
    ],
  },
  {
    title: 'a label every object inherits is not one',
    task: { capability_filters: { constructor: 'x' } },
    nodes: [node('a')],
    reasons: [['label_differs', 'the task wants constructor=x, but node a (no label constructor)']],
  },
  {
    title: 'dedicated work and only public nodes',
    task: { mode: 'dedicated' },
    nodes: [node('a')],
    reasons: [
      [
        'node_not_entitled',
        'node a (public, of org) may not take it: the task is dedicated and of org; dedicated nodes serve their own organization, public nodes public tasks',
      ],
    ],
  },
  {
    title: "public work and another organization's dedicated node",
    task: { organization_id: null },
    nodes: [node('a', { mode: 'dedicated' })],
    reasons: [
      [
        'node_not_entitled',
        'node a (dedicated, of org) may not take it: the task is public and of no organization; dedicated nodes serve their own organization, public nodes public tasks',
      ],
    ],
  },
  {
    title: 'nodes that could are away, one past the bound',
    task: {},
    nodes: [node('a', { last_seen_at: at(-AWAY_AFTER_MS - 1) }), node('b', { last_seen_at: null })],
    reasons: [
      ['nodes_away', 'nodes a (last seen 2 min ago) and b (never asked for work) could do it but are away'],
    ],
  },
  {
    title: 'a node at the bound is not away, nor one that works',
    task: {},
    nodes: [
      node('a', { last_seen_at: at(-AWAY_AFTER_MS) }),
      node('b', { last_seen_at: at(-10 * AWAY_AFTER_MS), active_leases: 1 }),
    ],
    reasons: [
      ['waiting_for_node', 'nodes a and b have a free slot and may take it at the next request for work'],
    ],
  },
  {
    title: 'every slot is busy, and what keeps the others is told after it',
    task: { capability_filters: { gpu: 'a100' } },
    nodes: [
      node('full', { labels: { gpu: 'a100' }, active_leases: 2 }),
      node('away', { labels: { gpu: 'a100' }, last_seen_at: at(-3 * 86_400_000) }),
      node('other', { labels: { gpu: 't4' } }),
    ],
    reasons: [
      ['slots_busy', 'every slot of node full (2 of 2) is busy'],
      ['nodes_away', 'node away (last seen 3 d ago) could do it but is away'],
      ['label_differs', 'the task wants gpu=a100, but node other (gpu=t4)'],
    ],
  },
  {
    title: 'others come first',
    task: { priority: 3 },
    nodes: [node('a', { active_leases: 2 })],
    standing: { ahead: { higherPriority: 2, older: 5 } },
    reasons: [
      ['slots_busy', 'every slot of node a (2 of 2) is busy'],
      ['behind_others', '7 tasks come before it: 2 of higher priority, 5 of its priority (3) and older'],
    ],
  },
  {
    title: 'many nodes are counted, not listed',
    task: {},
    nodes: Array.from({ length: 12 }, (_, index) => node(`n${index}`, { active_leases: 2 })),
    reasons: [['slots_busy', 'every slot of nodes n0 (2 of 2), n1 (2 of 2), n2 (2 of 2) and 9 more is busy']],
  },
  {
    title: 'it waits for stages: which, and how much of them is left',
    task: { stage: 'stitch', deps_remaining: 2 },
    others: [
      task({ id: 't2', stage: 'tiles', status: 'completed' }),
      task({ id: 't3', stage: 'tiles', status: 'running' }),
      task({ id: 't4', stage: 'tiles' }),
      task({ id: 't5', stage: 'legend' }),
      task({ id: 't6', stage: 'done', status: 'completed' }),
      task({ id: 't7', stage: 'unrelated' }),
    ],
    job: {
      edges: [
        { from: 'tiles', to: 'stitch' },
        { from: 'legend', to: 'stitch' },
        { from: 'done', to: 'stitch' },
        { from: 'unrelated', to: 'elsewhere' },
      ],
    },
    nodes: [node('a', { active_leases: 2 })],
    reasons: [
      ['waiting_for_stages', 'waits for stages tiles (2 of 3 tasks left), legend (1 of 1 task left)'],
    ],
  },
  {
    title: 'that nobody can do it is told also while it waits for a stage',
    task: { stage: 'stitch', deps_remaining: 1 },
    others: [task({ id: 't2', stage: 'tiles' })],
    job: { edges: [{ from: 'tiles', to: 'stitch' }] },
    nodes: [node('a', { capabilities: ['/render/tile/v1'] })],
    reasons: [
      ['waiting_for_stages', 'waits for stage tiles (1 of 1 task left)'],
      [
        'no_node_with_capability',
        'no node offers /render/tiles/v1; the nearest offered name is /render/tile/v1',
      ],
    ],
  },
  {
    title: 'a retry backs off',
    task: { not_before: at(12_400), attempts: 1, node_faults: 1, reason: 'runner failed: no disk' },
    nodes: [node('a')],
    reasons: [
      [
        'backing_off',
        'will be tried again in 12 s; attempt 2 ended: runner failed: no disk (1 of 3 attempts used)',
      ],
    ],
  },
  {
    title: 'a delay that is over is none',
    task: { not_before: at(0) },
    nodes: [node('a')],
    reasons: [['waiting_for_node', 'node a has a free slot and may take it at the next request for work']],
  },
  {
    title: 'it runs',
    task: {
      status: 'running',
      reserved_by: 'id-a',
      lease_expires_at: at(9_000),
      last_heartbeat_at: at(-6_000),
      meta: { progress: { pct: 40 } },
    },
    nodes: [node('a')],
    standing: { leasedAt: at(-200_000) },
    reasons: [
      [
        'running',
        'node a has been working on it for 3 min; last heartbeat 6 s ago, progress {"pct":40}; the lease ends in 9 s unless renewed',
      ],
    ],
  },
  {
    title: 'its key is full',
    task: { concurrency: { key: 'customer-7', limit: 2 } },
    nodes: [node('a')],
    standing: { heldOfKey: 2, ahead: { higherPriority: 0, older: 1 } },
    reasons: [
      ['key_busy', '2 of 2 tasks with key "customer-7" are running; it is given out when one of them ends'],
    ],
  },
  {
    title: 'its key is more than full, and no node could do it anyway',
    task: { concurrency: { key: 'k', limit: 1 }, resources: { gpu: 1 } },
    nodes: [node('a')],
    standing: { heldOfKey: 2 },
    reasons: [
      ['key_busy', '2 of 1 tasks with key "k" are running; it is given out when there are fewer'],
      ['node_too_small', 'node a (registered no gpu) is too small: it takes 1 gpu'],
    ],
  },
  {
    title: 'its key has room',
    task: { concurrency: { key: 'k', limit: 2 } },
    nodes: [node('a')],
    standing: { heldOfKey: 1 },
    reasons: [['waiting_for_node', 'node a has a free slot and may take it at the next request for work']],
  },
  {
    title: 'nodes are too small for it, each in another way',
    task: { resources: { cpu: 8, memory: 3 * 2 ** 30 } },
    nodes: [
      node('a', { resources: { cpu: 4, memory: 2 ** 40 }, resources_in_use: {} }),
      node('b', { resources: { cpu: 8, memory: 1.5 * 2 ** 30 }, resources_in_use: { cpu: 8 } }),
      node('c', { resources: { cpu: 64 }, resources_in_use: {} }),
    ],
    reasons: [
      [
        'node_too_small',
        'nodes a (has 4 cpu), b (has 1.5 GiB of memory) and c (registered no memory) are too small: it takes 8 cpu, 3 GiB of memory',
      ],
    ],
  },
  {
    title: 'nodes have no room for it now',
    task: {},
    nodes: [
      node('a', { resources: { cpu: 4 }, resources_in_use: { cpu: 3.5 }, active_leases: 1 }),
      node('b', { resources: { cpu: 0.5 }, resources_in_use: {} }),
    ],
    standing: { ahead: { higherPriority: 0, older: 2 } },
    reasons: [
      [
        'no_room',
        'node a (0.5 cpu left) has no room for it now: it takes 1 cpu; once it has waited 30 s, the node takes nothing of its priority or below before it',
      ],
      ['behind_others', '2 tasks come before it: 0 of higher priority, 2 of its priority (0) and older'],
      ['node_too_small', 'node b (has 0.5 cpu) is too small: it takes 1 cpu'],
    ],
  },
  {
    title: 'it was taken and nothing has been heard since',
    task: { status: 'leased', reserved_by: 'id-gone', lease_expires_at: at(-400) },
    nodes: [node('a')],
    standing: { leasedAt: at(-15_400) },
    reasons: [
      [
        'leased',
        'node id-gone has taken it 15 s ago and has not said yet that it began; the lease ended 400 ms ago and is being taken back',
      ],
    ],
  },
  {
    title: 'its node has it, where another has the slot',
    task: { status: 'running', reserved_by: 'id-a', lease_expires_at: at(9_000) },
    nodes: [node('a')],
    wait: { kind: 'slot', slot: 'camera', since: NOW - 4_000 },
    reasons: [
      ['waiting_for_slot', 'node a has it, and it has waited there for 4 s until slot camera is free'],
      ['running', 'node a has been working on it; the lease ends in 9 s unless renewed'],
    ],
  },
  {
    title: 'its node pauses before the next try',
    task: { status: 'running', reserved_by: 'id-a', lease_expires_at: at(9_000) },
    nodes: [node('a')],
    wait: { kind: 'try', tries: 2, until: NOW + 30_000, failure: 'sh ended with exit code 3' },
    reasons: [
      [
        'between_tries',
        'node a has it, and tries it again in 30 s, at 2025-06-01T12:00:30.000Z: try 2 failed, sh ended with exit code 3',
      ],
      ['running', 'node a has been working on it; the lease ends in 9 s unless renewed'],
    ],
  },
  {
    title: 'its node will start it again at any moment',
    task: { status: 'running', reserved_by: 'id-a', lease_expires_at: at(9_000) },
    nodes: [node('a')],
    wait: { kind: 'try', tries: 2, until: NOW - 1, failure: null },
    reasons: [
      [
        'between_tries',
        'node a has it, and is about to try it again: try 2 did its work, and it always restarts',
      ],
      ['running', 'node a has been working on it; the lease ends in 9 s unless renewed'],
    ],
  },
  {
    title: 'it is being canceled',
    task: {
      status: 'running',
      reserved_by: 'id-a',
      lease_expires_at: at(9_000),
      cancel_requested_at: at(-4_000),
      reason: 'canceled by the requestor',
    },
    nodes: [node('a')],
    reasons: [
      [
        'canceling',
        'it was asked to end 4 s ago (canceled by the requestor); node a has not said yet that the work is gone; the lease ends in 9 s unless renewed',
      ],
      ['running', 'node a has been working on it; the lease ends in 9 s unless renewed'],
    ],
  },
  {
    title: 'it completed',
    task: { status: 'completed', attempts: 2 },
    nodes: [node('a'), node('b')],
    receipts: [
      receipt({ node_id: 'id-b', outcome: 'completed', leased_at: at(-40_000), created_at: at(-30_000) }),
      receipt({ leased_at: at(-60_000), created_at: at(-50_000), reason: 'no' }),
    ],
    reasons: [['completed', 'completed 30 s ago by node b in 10 s, in attempt 2']],
  },
  {
    title: 'it failed for good',
    task: { status: 'failed', attempts: 3, reason: 'runner failed: bad input' },
    reasons: [['failed', 'failed 30 s ago after 3 of 3 attempts: runner failed: bad input']],
  },
  {
    title: 'it failed although attempts were left',
    task: { status: 'failed', attempts: 1, reason: 'runner failed: bad input' },
    reasons: [
      [
        'failed',
        'failed 30 s ago after 1 of 3 attempts: runner failed: bad input (trying again was said to be of no use)',
      ],
    ],
  },
  {
    title: 'its deadline passed',
    task: { status: 'failed', attempts: 1, reason: 'deadline' },
    reasons: [['failed', 'failed 30 s ago after 1 of 3 attempts: deadline']],
  },
  {
    title: 'it was submitted to wait, and nobody could do it anyway',
    task: { not_before: at(300_000) },
    nodes: [OFFERS_OTHER],
    reasons: [
      ['waiting_until', 'waits until 2025-06-01T12:05:00.000Z, in 5 min, as it was submitted'],
      [
        'no_node_with_capability',
        'no node offers /render/tiles/v1; the nearest offered names are /render/tile/v1, /render/tiles/v2',
      ],
    ],
  },
  {
    title: 'it was submitted to wait until a time that has passed',
    task: { not_before: at(-1) },
    nodes: [],
    reasons: [
      [
        'no_node_registered',
        'no node has ever registered here; "millrace node start" runs one, "millrace nodes add" makes its credentials',
      ],
    ],
  },
  {
    title: 'it was canceled',
    task: { status: 'canceled', reason: 'canceled by the requestor' },
    reasons: [['canceled', 'canceled 30 s ago: canceled by the requestor']],
  },
];

const explain = (scene: Case) => {
  const one = task(scene.task);
  const job = detail([one, ...(scene.others ?? [])], {
    ...(scene.job !== undefined && { job: scene.job }),
    ...(scene.receipts !== undefined && { receipts: scene.receipts }),
  });
  const waits = new Map(scene.wait === undefined ? [] : [[one.id, scene.wait]]);
  return explainTask({ nowMs: NOW, job, nodes: scene.nodes ?? [], waits }, one, standing(scene.standing));
};

describe('redriven jobs', () => {
  test('both sides are told of each other', () => {
    const failed = task({ status: 'failed', reason: 'it broke', attempts: 3 });
    const old = { ...detail([failed]), redriven_as: ['job-2', 'job-3'] };
    const [reason] = explainTask({ nowMs: NOW, job: old, nodes: [] }, failed, null).reasons;
    expect(reason?.message).toBe(
      'failed 30 s ago after 3 of 3 attempts: it broke; job job-3 does again what it left undone, as did 1 job before',
    );
    const told = explainJob({ nowMs: NOW, job: old, nodes: [] });
    expect(told.redriven_as).toEqual(['job-2', 'job-3']);
    expect(told.message).toContain('job job-3 does again what it left undone');
    const fresh = detail([task()]);
    const again = explainJob({
      nowMs: NOW,
      job: { ...fresh, job: { ...fresh.job, redrive_of: 'job-0' } },
      nodes: [],
    });
    expect(again.redrive_of).toBe('job-0');
    expect(again.message).toMatch(/; it does again what job job-0 left undone$/);
  });
});

describe('explainTask', () => {
  test.each(CASES)('$title', (scene) => {
    expect(explain(scene).reasons.map(({ code, message }) => [code, message])).toEqual(scene.reasons);
  });

  test('every code has a case', () => {
    const codes: Record<ReasonCode, true> = {
      waiting_for_stages: true,
      backing_off: true,
      waiting_until: true,
      no_node_registered: true,
      no_node_with_capability: true,
      label_differs: true,
      node_not_entitled: true,
      nodes_away: true,
      slots_busy: true,
      key_busy: true,
      node_too_small: true,
      no_room: true,
      behind_others: true,
      waiting_for_node: true,
      leased: true,
      running: true,
      waiting_for_slot: true,
      between_tries: true,
      canceling: true,
      completed: true,
      failed: true,
      canceled: true,
    };
    const told = new Set(CASES.flatMap(({ reasons }) => reasons.map(([code]) => code)));
    expect([...told].toSorted()).toEqual(Object.keys(codes).toSorted());
  });

  test('numbers stand beside the sentences, and lists are bounded while counts are not', () => {
    const nodes = Array.from({ length: 12 }, (_, index) =>
      node(`n${index}`, { active_leases: 2, max_concurrency: 2 }),
    );
    const [reason] = explain({ title: '', task: {}, nodes, reasons: [] }).reasons;
    expect(reason).toMatchObject({ code: 'slots_busy', count: 12 });
    const listed = (reason as Extract<Reason, { code: 'slots_busy' }>).nodes;
    expect(listed).toHaveLength(10);
    expect(listed[0]).toEqual({ node_id: 'id-n0', name: 'n0', slots: 2, in_use: 2 });
  });

  test('attempts are told in the order of their leases, numbered like their logs', () => {
    const receipts = [
      receipt({ id: 'l2', outcome: 'expired', leased_at: at(-20_000), created_at: at(-10_000) }),
      receipt({ id: 'l1', reason: 'no', leased_at: at(-40_000), created_at: at(-30_000) }),
      receipt({ task_id: 'another' }),
    ];
    expect(explain({ title: '', task: {}, nodes: [node('a')], receipts, reasons: [] }).attempts).toEqual([
      {
        attempt: 1,
        node_id: 'id-a',
        name: 'a',
        outcome: 'failed',
        reason: 'no',
        leased_at: at(-40_000),
        ended_at: at(-30_000),
      },
      {
        attempt: 2,
        node_id: 'id-a',
        name: 'a',
        outcome: 'expired',
        reason: null,
        leased_at: at(-20_000),
        ended_at: at(-10_000),
      },
    ]);
  });
});

describe('explainJob', () => {
  test('groups what has not ended by what it has in common, and names what failed', () => {
    const job = detail([
      task({ id: 't1', status: 'completed' }),
      task({ id: 't2', status: 'running', reserved_by: 'id-a', lease_expires_at: at(5_000) }),
      task({ id: 't3', status: 'running', reserved_by: 'id-a', lease_expires_at: at(6_000) }),
      task({ id: 't4' }),
      task({ id: 't5' }),
      task({ id: 't6', capability: '/nobody/v1' }),
      task({ id: 't7', status: 'failed', reason: 'no', attempts: 3 }),
      task({ id: 't8', status: 'canceled' }),
    ]);
    const told = explainJob({ nowMs: NOW, job, nodes: [node('a', { active_leases: 2 })] });
    expect(told.message).toBe('1 of 8 tasks are completed, 5 have not ended');
    expect(
      told.groups.map(({ reason, count, tasks }) => [reason.code, count, tasks.map((each) => each.task_id)]),
    ).toEqual([
      ['running', 2, ['t2', 't3']],
      ['slots_busy', 2, ['t4', 't5']],
      ['no_node_with_capability', 1, ['t6']],
      ['failed', 1, ['t7']],
    ]);
  });

  test('tasks that wait for one key are one group, with how many of it run', () => {
    const keyed = (id: string, key: string, limit: number): TaskRecord =>
      task({ id, concurrency: { key, limit } });
    const job = detail([keyed('t1', 'x', 2), keyed('t2', 'x', 2), keyed('t3', 'x', 3), keyed('t4', 'y', 2)]);
    const heldOfKeys = new Map([['x', 2]]);
    const told = explainJob({ nowMs: NOW, job, nodes: [node('a')], heldOfKeys });
    expect(told.groups.map(({ reason, count }) => [reason.code, count])).toEqual([
      ['key_busy', 2],
      ['waiting_for_node', 2],
    ]);
  });

  test('a job of ten thousand tasks and a hundred nodes is explained in a moment', () => {
    const tasks = Array.from({ length: 10_000 }, (_, index) => task({ id: `t${index}` }));
    const nodes = Array.from({ length: 100 }, (_, index) => node(`n${index}`, { active_leases: 2 }));
    const before = process.cpuUsage();
    const told = explainJob({ nowMs: NOW, job: detail(tasks), nodes });
    expect(told.groups).toMatchObject([{ count: 10_000 }]);
    expect(told.groups[0]!.tasks).toHaveLength(10);
    // Judging every node for every task would take seconds.
    expect(process.cpuUsage(before).user).toBeLessThan(1_000_000);
  });

  test('a finished job has nothing left to explain', () => {
    const job = detail([task({ status: 'completed' })], { job: { status: 'completed' } });
    expect(explainJob({ nowMs: NOW, job, nodes: [] })).toMatchObject({
      message: 'the job is completed; 1 of 1 tasks are completed',
      groups: [],
    });
  });
});

describe('nearestNames', () => {
  test('a third of the characters may differ, and no more', () => {
    expect(nearestNames('/abcdefgh/v1', new Set(['/abcdXXXX/v1']))).toEqual(['/abcdXXXX/v1']);
    expect(nearestNames('/abcdefgh/v1', new Set(['/abcXXXXX/v1']))).toEqual([]);
    expect(nearestNames('', new Set(['ab', 'abc']))).toEqual(['ab']);
  });
});
