/**
 * How much work waits, and who could do it: for people, and for what starts and stops nodes. Pure: what the store counts and
 * the nodes it knows in, figures out. Which node may take what is `stores/matching.ts`.
 */
import { AWAY_AFTER_MS } from './explain.ts';
import type { CapabilityFilters, NodeMode, NodeRecord } from './records.ts';
import type { QueueStanding } from './store.ts';
import { match } from './stores/matching.ts';

/** Counts of tasks that have not ended. */
export interface WaitingWork {
  /** A node may take them. */
  readonly ready: number;
  /** Wait for an earlier stage. */
  readonly blocked: number;
  /** Wait for their time, as submitted or after a failed attempt. */
  readonly delayed: number;
  /** A node has them. */
  readonly running: number;
  /** How long the oldest of those that are ready has waited; null: none is. */
  readonly oldest_age_ms: number | null;
}

/** Who could do it. A node is away that holds no lease and has not asked for work for two minutes. */
export interface AbleNodes {
  /** Not away. */
  readonly nodes: number;
  readonly nodes_away: number;
  /** Of the nodes that are not away. A slot counts wherever it could serve, so these are no shares. */
  readonly slots: number;
  readonly free_slots: number;
}

/** The tasks that make the same demands on a node. */
export interface QueueEntry extends WaitingWork, AbleNodes {
  readonly capability: string;
  readonly capability_filters: CapabilityFilters;
  readonly mode: NodeMode;
  readonly organization_id: string | null;
}

export interface CapabilityEntry extends WaitingWork, AbleNodes {
  readonly capability: string;
}

export interface QueueReport {
  /** When this was so. */
  readonly at: string;
  /** Those with tasks that have not ended. */
  readonly queues: readonly QueueEntry[];
  /**
   * The same by capability: of those, and of all that a registered node offers. Nodes are counted that offer it, whatever their
   * labels.
   */
  readonly capabilities: readonly CapabilityEntry[];
}

const NOTHING: WaitingWork = { ready: 0, blocked: 0, delayed: 0, running: 0, oldest_age_ms: null };

export function queueReport(
  standings: readonly QueueStanding[],
  allNodes: readonly NodeRecord[],
  nowMs: number,
): QueueReport {
  const nodes = allNodes.filter(({ registered_at }) => registered_at !== null);
  const offered = new Set(nodes.flatMap(({ capabilities }) => capabilities));
  const queues = standings.map((standing): QueueEntry => {
    const { capability, filters, mode, organizationId } = standing;
    const able = nodes.filter(
      (node) => match(standing, { ...node, organizationId: node.organization_id }) !== 'never',
    );
    return {
      capability,
      capability_filters: filters,
      mode,
      organization_id: organizationId,
      ...workOf(standing),
      ...countNodes(able, nowMs),
    };
  });
  const work = new Map<string, WaitingWork>([...offered].map((capability) => [capability, NOTHING]));
  for (const queue of queues) {
    work.set(queue.capability, addWork(work.get(queue.capability) ?? NOTHING, queue));
  }
  return {
    at: new Date(nowMs).toISOString(),
    queues,
    capabilities: [...work]
      .toSorted(([a], [b]) => (a < b ? -1 : 1))
      .map(([capability, sums]) => ({
        capability,
        ...sums,
        ...countNodes(
          nodes.filter(({ capabilities }) => capabilities.includes(capability)),
          nowMs,
        ),
      })),
  };
}

/** Capabilities with a line of their own in metrics. */
const LABELLED = 100;

/**
 * By capability for metrics, whose labels must not come from who submits: those that a registered node offers, at most
 * {@link LABELLED} of them, and what is left together as `other`.
 */
export function boundedCapabilities(
  { capabilities }: QueueReport,
  allNodes: readonly NodeRecord[],
): readonly CapabilityEntry[] {
  const offered = new Set(allNodes.flatMap((node) => node.capabilities));
  const named = capabilities.filter(({ capability }) => offered.has(capability)).slice(0, LABELLED);
  const names = new Set(named.map(({ capability }) => capability));
  const others = capabilities.filter(({ capability }) => !names.has(capability));
  const none: AbleNodes = { nodes: 0, nodes_away: 0, slots: 0, free_slots: 0 };
  return [
    ...named,
    others.reduce<CapabilityEntry>((sum, each) => ({ ...sum, ...addWork(sum, each) }), {
      capability: 'other',
      ...NOTHING,
      ...none,
    }),
  ];
}

function workOf({ ready, blocked, delayed, held, oldestReadyAgeMs }: QueueStanding): WaitingWork {
  return { ready, blocked, delayed, running: held, oldest_age_ms: oldestReadyAgeMs };
}

function addWork(a: WaitingWork, b: WaitingWork): WaitingWork {
  const ages = [a.oldest_age_ms, b.oldest_age_ms].filter((age) => age !== null);
  return {
    ready: a.ready + b.ready,
    blocked: a.blocked + b.blocked,
    delayed: a.delayed + b.delayed,
    running: a.running + b.running,
    oldest_age_ms: ages.length === 0 ? null : Math.max(...ages),
  };
}

function countNodes(nodes: readonly NodeRecord[], nowMs: number): AbleNodes {
  const there = nodes.filter(
    ({ active_leases, last_seen_at }) =>
      active_leases > 0 || (last_seen_at !== null && nowMs - Date.parse(last_seen_at) <= AWAY_AFTER_MS),
  );
  return {
    nodes: there.length,
    nodes_away: nodes.length - there.length,
    slots: there.reduce((sum, { max_concurrency }) => sum + max_concurrency, 0),
    free_slots: there.reduce(
      (sum, { max_concurrency, active_leases }) => sum + Math.max(0, max_concurrency - active_leases),
      0,
    ),
  };
}
