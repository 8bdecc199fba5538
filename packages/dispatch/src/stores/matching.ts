/**
 * Which node may take which work. Tasks with the same demands form a queue; a node is matched against queues, never
 * against single tasks.
 */
import { selectorFromFilters, selectorMatches } from '@millrace/runner/model';
import type { CapabilityFilters, NodeMode } from '../records.ts';
import type { Resources } from '../resources.ts';
import { shortage } from './fitting.ts';

/** What the tasks of one queue demand of a node. */
export interface Demand {
  readonly capability: string;
  readonly filters: CapabilityFilters;
  readonly mode: NodeMode;
  /** The job's organization; null: none. */
  readonly organizationId: string | null;
  /** What each task takes of a node. Null or absent: it names nothing. */
  readonly resources?: Resources | null;
}

/** What a node offers. */
export interface Offer {
  readonly capabilities: readonly string[];
  readonly labels: Readonly<Record<string, string>>;
  readonly mode: NodeMode;
  readonly organizationId: string;
  /** Null or absent: it does not say. */
  readonly resources?: Resources | null;
}

/**
 * - `preferred` work the node is meant for: a dedicated node's dedicated tasks, a public node's own organization
 * - `other` everything else it may take, after all of the above
 * - `never` a capability it has not registered, a filter that its label does not satisfy, more than it has of a resource, or
 *   work it is not allowed to see: public nodes take public work of any organization, dedicated nodes only work of their own.
 */
export function match(demand: Demand, offer: Offer): 'preferred' | 'other' | 'never' {
  if (!offer.capabilities.includes(demand.capability)) return 'never';
  if (differingLabel(demand.filters, offer.labels) !== null) return 'never';
  if (shortage(demand.resources, offer.resources) !== null) return 'never';
  const own = demand.organizationId === offer.organizationId;
  if (offer.mode === 'dedicated') {
    if (!own) return 'never';
    return demand.mode === 'dedicated' ? 'preferred' : 'other';
  }
  if (demand.mode === 'dedicated') return 'never';
  return own ? 'preferred' : 'other';
}

/** The first label that is not what the filters ask for; null: all are. */
export function differingLabel(
  filters: CapabilityFilters,
  labels: Readonly<Record<string, string>>,
): string | null {
  const differing = Object.entries(filters).find(([label, wanted]) =>
    typeof wanted === 'string'
      ? !Object.hasOwn(labels, label) || labels[label] !== wanted
      : !selectorMatches(selectorFromFilters({ [label]: wanted }), labels),
  );
  return differing?.[0] ?? null;
}
