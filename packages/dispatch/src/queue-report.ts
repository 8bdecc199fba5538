/**
 * How much work waits, and who could do it: for people, and for what starts and stops nodes. Pure: what the store counts and
 * the nodes it knows in, figures out. Which node may take what is `stores/matching.ts`.
 */
import { AWAY_AFTER_MS } from './explain.ts';
import type { CapabilityFilters, NodeMode, NodeRecord } from './records.ts';
import type { Resources } from './resources.ts';
import type { QueueStanding } from './store.ts';
import { fitting } from './stores/fitting.ts';
import { match } from './stores/matching.ts';

/** Counts of tasks that have not ended. */
export interface WaitingWork {
  /** A node may take them. */
  readonly ready: number;
  /** Of these, those that wait because as many tasks of their key are held as their limit allows. */
  readonly limited: number;
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
  /**
   * Of the nodes that are not away. A slot counts wherever it could serve, so these are no shares. A node that says what it has
   * counts as many as would fit, by capability those of one `cpu`.
   */
  readonly slots: number;
  readonly free_slots: number;
}

/** The tasks that make the same demands on a node. */
export interface QueueEntry extends WaitingWork, AbleNodes {
  readonly capability: string;
  readonly capability_filters: CapabilityFilters;
  readonly mode: NodeMode;
  readonly organization_id: string | null;
  /** What each of them takes of a node; absent: they name nothing. */
  readonly resources?: Resources;
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

const NOTHING: WaitingWork = {
  ready: 0,
  limited: 0,
  blocked: 0,
  delayed: 0,
  running: 0,
  oldest_age_ms: null,
};

export function queueReport(
  standings: readonly QueueStanding[],
  allNodes: readonly NodeRecord[],
  nowMs: number,
): QueueReport {
  const nodes = allNodes.filter(({ registered_at }) => registered_at !== null);
  const index = new NodeIndex(nodes);
  const queues = standings.map((standing): QueueEntry => {
    const { capability, filters, mode, organizationId, resources } = standing;
    return {
      capability,
      capability_filters: filters,
      mode,
      organization_id: organizationId,
      ...(resources !== undefined && { resources }),
      ...workOf(standing),
      ...countNodes(index.able(standing), nowMs, resources),
    };
  });
  const work = new Map<string, WaitingWork>();
  for (const capability of index.capabilities()) work.set(capability, NOTHING);
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
        ...countNodes(index.offering(capability), nowMs),
      })),
  };
}

/**
 * Finds the nodes for a queue without a look at all of them for each: a thousand queues and a thousand nodes are a million pairs,
 * and meanwhile no heartbeat is answered.
 */
class NodeIndex {
  readonly #byCapability = new Map<string, NodeRecord[]>();
  /** By capability and label: the nodes by what the label is. Made when first asked for. */
  readonly #byLabel = new Map<string, ReadonlyMap<string, readonly NodeRecord[]>>();
  /** By capability: the nodes that are alike to a queue without filters. Made when first asked for. */
  readonly #alike = new Map<string, readonly (readonly NodeRecord[])[]>();

  constructor(nodes: readonly NodeRecord[]) {
    for (const node of nodes) {
      for (const capability of node.capabilities) add(this.#byCapability, capability, node);
    }
  }

  capabilities(): Iterable<string> {
    return this.#byCapability.keys();
  }

  offering(capability: string): readonly NodeRecord[] {
    return this.#byCapability.get(capability) ?? [];
  }

  able(standing: QueueStanding): readonly NodeRecord[] {
    const { capability, filters } = standing;
    const isAble = (node: NodeRecord): boolean =>
      match(standing, { ...node, organizationId: node.organization_id }) !== 'never';
    const labels = Object.entries(filters);
    if (labels.length === 0) {
      return this.#alikeOf(capability)
        .filter(([one]) => one !== undefined && isAble(one))
        .flat();
    }
    let candidates = this.offering(capability);
    for (const [label, wanted] of labels) {
      if (typeof wanted !== 'string') continue;
      const having = this.#labelled(capability, label).get(wanted) ?? [];
      if (having.length < candidates.length) candidates = having;
    }
    return candidates.filter(isAble);
  }

  #alikeOf(capability: string): readonly (readonly NodeRecord[])[] {
    let alike = this.#alike.get(capability);
    if (alike === undefined) {
      const groups = new Map<string, NodeRecord[]>();
      for (const node of this.offering(capability)) {
        add(groups, JSON.stringify([node.mode, node.organization_id, node.resources]), node);
      }
      alike = [...groups.values()];
      this.#alike.set(capability, alike);
    }
    return alike;
  }

  #labelled(capability: string, label: string): ReadonlyMap<string, readonly NodeRecord[]> {
    const key = JSON.stringify([capability, label]);
    let labelled = this.#byLabel.get(key);
    if (labelled === undefined) {
      const groups = new Map<string, NodeRecord[]>();
      for (const node of this.offering(capability)) {
        const value = Object.hasOwn(node.labels, label) ? node.labels[label] : undefined;
        if (value !== undefined) add(groups, value, node);
      }
      labelled = groups;
      this.#byLabel.set(key, labelled);
    }
    return labelled;
  }
}

function add(groups: Map<string, NodeRecord[]>, key: string, node: NodeRecord): void {
  const group = groups.get(key);
  if (group === undefined) groups.set(key, [node]);
  else group.push(node);
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

function workOf({ ready, limited, blocked, delayed, held, oldestReadyAgeMs }: QueueStanding): WaitingWork {
  return { ready, limited, blocked, delayed, running: held, oldest_age_ms: oldestReadyAgeMs };
}

function addWork(a: WaitingWork, b: WaitingWork): WaitingWork {
  const ages = [a.oldest_age_ms, b.oldest_age_ms].filter((age) => age !== null);
  return {
    ready: a.ready + b.ready,
    limited: a.limited + b.limited,
    blocked: a.blocked + b.blocked,
    delayed: a.delayed + b.delayed,
    running: a.running + b.running,
    oldest_age_ms: ages.length === 0 ? null : Math.max(...ages),
  };
}

function countNodes(nodes: readonly NodeRecord[], nowMs: number, demand?: Resources): AbleNodes {
  const there = nodes.filter(
    ({ active_leases, last_seen_at }) =>
      active_leases > 0 || (last_seen_at !== null && nowMs - Date.parse(last_seen_at) <= AWAY_AFTER_MS),
  );
  return {
    nodes: there.length,
    nodes_away: nodes.length - there.length,
    slots: there.reduce((sum, node) => sum + bounded(node, node.max_concurrency, demand, {}), 0),
    free_slots: there.reduce((sum, node) => {
      const { max_concurrency, active_leases, resources_in_use } = node;
      return sum + bounded(node, Math.max(0, max_concurrency - active_leases), demand, resources_in_use);
    }, 0),
  };
}

/** As many slots as there is room for. */
function bounded(
  { resources }: NodeRecord,
  slots: number,
  demand: Resources | undefined,
  inUse: Resources | undefined,
): number {
  return resources === undefined ? slots : Math.min(slots, fitting(demand, resources, inUse));
}
