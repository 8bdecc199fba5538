/**
 * Why a task is not running, how it is doing, or how it ended: reasons as codes with numbers, each with a sentence for
 * people. Pure: a snapshot of records in, reasons out. The rules themselves are `lifecycle.ts` and `stores/matching.ts`.
 *
 * A task that waits is looked at from its own side first (a stage before it, a retry's delay), then from the nodes'. Each node
 * is judged by the first thing that keeps it from the task: the capability, a label, whom it works for, its size, that it is
 * away, that its slots are taken, or what else it does. What keeps the nearest ones comes first; nodes that are further away are told of when no node
 * is about to take the task.
 */
import type { Json } from '@millrace/runner';
import type {
  AttemptOutcome,
  JobDetail,
  JobStatus,
  NodeMode,
  NodeRecord,
  ReceiptRecord,
  TaskRecord,
  TaskStatus,
  CapabilityFilters,
} from './records.ts';
import type { NodeWait } from './node-wait.ts';
import type { TaskStanding } from './store.ts';
import { OVERTAKING_MS, Usage, shortage } from './stores/fitting.ts';
import type { Shortage } from './stores/fitting.ts';
import { differingLabel, match } from './stores/matching.ts';

/**
 * A node that holds no lease and has not asked for work for this long is taken to be away. Nodes that wait for work ask at
 * least every minute.
 */
export const AWAY_AFTER_MS = 120_000;

/** Nodes, tasks and names listed with a reason; the count is of all. */
const LISTED = 10;

export interface NodeName {
  readonly node_id: string;
  readonly name: string;
}

/** What a node has too little of. */
export interface Lack {
  readonly resource: string;
  readonly needed: number;
  /** What it has, or has left. */
  readonly free: number;
}

export type Reason = { readonly message: string } & (
  | {
      readonly code: 'waiting_for_stages';
      /** Those directly before it that are not complete. */
      readonly stages: readonly {
        readonly stage: string;
        readonly tasks_left: number;
        readonly tasks: number;
      }[];
    }
  | {
      readonly code: 'backing_off';
      readonly not_before: string;
      readonly wait_ms: number;
      readonly attempts: number;
      readonly max_attempts: number;
      readonly last_reason: string | null;
    }
  | {
      /** It was submitted to wait. */
      readonly code: 'waiting_until';
      readonly not_before: string;
      readonly wait_ms: number;
    }
  | { readonly code: 'no_node_registered' }
  | {
      readonly code: 'no_node_with_capability';
      readonly capability: string;
      /** What nodes offer that is spelled most like it. */
      readonly nearest: readonly string[];
    }
  | {
      readonly code: 'label_differs';
      readonly count: number;
      readonly nodes: readonly (NodeName & {
        readonly label: string;
        readonly wanted: string;
        /** null: the node has no such label. */
        readonly found: string | null;
      })[];
    }
  | {
      readonly code: 'node_not_entitled';
      readonly mode: NodeMode;
      readonly organization_id: string | null;
      readonly count: number;
      readonly nodes: readonly (NodeName & { readonly mode: NodeMode; readonly organization_id: string })[];
    }
  | {
      readonly code: 'nodes_away';
      readonly count: number;
      readonly nodes: readonly (NodeName & { readonly last_seen_at: string | null })[];
    }
  | {
      readonly code: 'slots_busy';
      readonly count: number;
      readonly nodes: readonly (NodeName & { readonly slots: number; readonly in_use: number })[];
    }
  | {
      /** As many tasks of its key are leased or running as its limit allows. */
      readonly code: 'key_busy';
      readonly key: string;
      readonly limit: number;
      readonly running: number;
    }
  | {
      /** Nodes that have less of something than the task takes, whatever else they do. */
      readonly code: 'node_too_small';
      readonly count: number;
      readonly nodes: readonly (NodeName & Lack)[];
    }
  | {
      /** Nodes that are large enough and have no room beside what they do now. */
      readonly code: 'no_room';
      readonly count: number;
      readonly nodes: readonly (NodeName & Lack)[];
    }
  | {
      readonly code: 'behind_others';
      readonly higher_priority: number;
      readonly older: number;
      readonly priority: number;
    }
  | {
      /** A node with a free slot may take it at any moment. */
      readonly code: 'waiting_for_node';
      readonly count: number;
      readonly nodes: readonly (NodeName & { readonly free_slots: number })[];
    }
  | ({
      /** `leased`: the node has not said yet that it began. */
      readonly code: 'leased' | 'running';
      readonly since: string | null;
      readonly lease_expires_at: string | null;
      readonly last_heartbeat_at: string | null;
      readonly progress: Json;
    } & NodeName)
  | ({
      /** A node has it, and another task has the slot there that it asked for. */
      readonly code: 'waiting_for_slot';
      readonly slot: string;
      readonly since: string;
    } & NodeName)
  | ({
      /** A node has it and has tried it, and pauses before it does again. */
      readonly code: 'between_tries';
      readonly tries: number;
      readonly not_before: string;
      readonly wait_ms: number;
      /** null: the last try did its work. */
      readonly last_reason: string | null;
    } & NodeName)
  | ({
      readonly code: 'canceling';
      readonly requested_at: string;
      readonly lease_expires_at: string | null;
    } & NodeName)
  | {
      readonly code: 'completed' | 'failed' | 'canceled';
      readonly reason: string | null;
      readonly at: string;
      readonly attempts: number;
      readonly max_attempts: number;
    }
);

export type ReasonCode = Reason['code'];

/** An attempt that ended. */
export interface EndedAttempt extends NodeName {
  /** Counted from 1 over all leases, as for the task's logs. */
  readonly attempt: number;
  readonly outcome: AttemptOutcome;
  readonly reason: string | null;
  readonly leased_at: string;
  readonly ended_at: string;
}

export interface TaskExplanation {
  readonly task_id: string;
  readonly job_id: string;
  readonly stage: string;
  readonly label: string;
  readonly capability: string;
  readonly status: TaskStatus;
  /** When this was so. */
  readonly at: string;
  /** The most important first; never empty. */
  readonly reasons: readonly Reason[];
  /** In the order they ended. */
  readonly attempts: readonly EndedAttempt[];
}

export interface ReasonGroup {
  /** The first and most important reason of each task of the group. */
  readonly reason: Reason;
  /** Further reasons of the group's first task. */
  readonly more: readonly Reason[];
  readonly count: number;
  /** The first of them. */
  readonly tasks: readonly { readonly task_id: string; readonly stage: string; readonly label: string }[];
}

export interface JobExplanation {
  readonly job_id: string;
  readonly label: string;
  readonly status: JobStatus;
  readonly at: string;
  readonly message: string;
  /** Tasks that have not ended, and those that failed, by what they have in common. */
  readonly groups: readonly ReasonGroup[];
  /** The job whose undone tasks these are. */
  readonly redrive_of?: string;
  /** Jobs that do again what this one left undone. */
  readonly redriven_as?: readonly string[];
}

export interface JobSnapshot {
  readonly nowMs: number;
  readonly job: JobDetail;
  readonly nodes: readonly NodeRecord[];
  /** Of running tasks, by their ids, what they wait for on their nodes. Default: nothing that is known. */
  readonly waits?: ReadonlyMap<string, NodeWait>;
  /** By key, how many tasks of it are leased or running. Default: not known, but for a task whose standing tells it. */
  readonly heldOfKeys?: ReadonlyMap<string, number>;
}

/** `standing`: null leaves out since when it is held, and its place in line. */
export function explainTask(
  snapshot: JobSnapshot,
  task: TaskRecord,
  standing: TaskStanding | null,
): TaskExplanation {
  const view = new View(snapshot);
  const { id, job_id, stage, label, capability, status } = task;
  return {
    task_id: id,
    job_id,
    stage,
    label,
    capability,
    status,
    at: isoTime(snapshot.nowMs),
    reasons: view.reasons(task, standing),
    attempts: view.attempts(task),
  };
}

export function explainJob(snapshot: JobSnapshot): JobExplanation {
  const view = new View(snapshot);
  const { job, tasks, tasks_summary: counts, redriven_as } = snapshot.job;
  const groups = new Map<string, { reasons: readonly Reason[]; tasks: TaskRecord[] }>();
  for (const task of tasks) {
    if (task.status === 'completed' || task.status === 'canceled') continue;
    const reasons = view.reasons(task, null);
    const key = groupKey(task, reasons);
    const group = groups.get(key);
    if (group === undefined) groups.set(key, { reasons, tasks: [task] });
    else group.tasks.push(task);
  }
  const left = counts.queued + counts.leased + counts.running;
  const done = `${counts.completed} of ${tasks.length} tasks are completed`;
  return {
    job_id: job.id,
    label: job.label,
    status: job.status,
    at: isoTime(snapshot.nowMs),
    message:
      (left === 0
        ? `the job is ${job.status}; ${done}`
        : `${done}, ${left} ${left === 1 ? 'has' : 'have'} not ended` +
          (job.cancel_requested_at === null ? '' : '; the job is being canceled')) +
      (job.redrive_of === undefined ? '' : `; it does again what job ${job.redrive_of} left undone`) +
      (redriven_as === undefined ? '' : `; ${redrivenAs(redriven_as)}`),
    ...(job.redrive_of !== undefined && { redrive_of: job.redrive_of }),
    ...(redriven_as !== undefined && { redriven_as }),
    groups: [...groups.values()].map(({ reasons, tasks: members }) => {
      const [reason, ...more] = reasons as [Reason, ...Reason[]];
      return {
        reason,
        more,
        count: members.length,
        tasks: members.slice(0, LISTED).map(({ id, stage, label }) => ({ task_id: id, stage, label })),
      };
    }),
  };
}

function redrivenAs(jobs: readonly string[]): string {
  const last = jobs.at(-1) ?? '';
  const more = jobs.length - 1;
  return `job ${last} does again what it left undone${more > 0 ? `, as did ${plural(more, 'job')} before` : ''}`;
}

/** Tasks of one key have their first reason in common, as far as it says something about more than one task. */
function groupKey(task: TaskRecord, [first]: readonly Reason[]): string {
  return JSON.stringify([first?.code, first === undefined ? null : inCommon(task, first)]);
}

function inCommon(task: TaskRecord, reason: Reason): unknown {
  switch (reason.code) {
    case 'waiting_for_stages':
      return reason.stages.map(({ stage }) => stage);
    case 'backing_off':
      return reason.last_reason;
    case 'waiting_until':
      return reason.not_before;
    case 'between_tries':
      return [reason.node_id, reason.last_reason];
    case 'waiting_for_slot':
      return [reason.node_id, reason.slot];
    case 'leased':
    case 'running':
    case 'canceling':
      return reason.node_id;
    case 'completed':
    case 'failed':
    case 'canceled':
      return reason.reason;
    case 'key_busy':
      return [reason.key, reason.limit];
    case 'no_node_registered':
    case 'no_node_with_capability':
    case 'label_differs':
    case 'node_not_entitled':
    case 'nodes_away':
    case 'slots_busy':
    case 'node_too_small':
    case 'no_room':
    case 'behind_others':
    case 'waiting_for_node':
      return demandKey(task);
    default:
      return reason satisfies never;
  }
}

function demandKey(task: TaskRecord): string {
  const { capability, capability_filters, mode, organization_id, resources } = task;
  return JSON.stringify([capability, capability_filters, mode, organization_id, resources]);
}

/** What is the same for all tasks of a job is found out once. */
class View {
  readonly #now: number;
  readonly #job: JobDetail;
  readonly #nodes: readonly NodeRecord[];
  readonly #names: ReadonlyMap<string, string>;
  readonly #ofNodes = new Map<string, readonly Reason[]>();
  readonly #stages = new Map<string, { tasks: number; left: number }>();
  readonly #receipts = new Map<string, ReceiptRecord[]>();
  readonly #waits: ReadonlyMap<string, NodeWait>;
  readonly #heldOfKeys: ReadonlyMap<string, number>;

  constructor({ nowMs, job, nodes, waits = new Map(), heldOfKeys = new Map() }: JobSnapshot) {
    this.#waits = waits;
    this.#heldOfKeys = heldOfKeys;
    this.#now = nowMs;
    this.#job = job;
    this.#nodes = nodes.filter((node) => node.registered_at !== null);
    this.#names = new Map(nodes.map((node) => [node.id, node.name]));
    for (const { stage, status } of job.tasks) {
      const counts = this.#stages.get(stage) ?? { tasks: 0, left: 0 };
      counts.tasks += 1;
      if (status !== 'completed') counts.left += 1;
      this.#stages.set(stage, counts);
    }
    for (const receipt of job.receipts) {
      const list = this.#receipts.get(receipt.task_id);
      if (list === undefined) this.#receipts.set(receipt.task_id, [receipt]);
      else list.push(receipt);
    }
  }

  attempts(task: TaskRecord): EndedAttempt[] {
    return (this.#receipts.get(task.id) ?? [])
      .toSorted((a, b) => (a.leased_at < b.leased_at ? -1 : a.leased_at > b.leased_at ? 1 : 0))
      .map((receipt, index) => ({
        attempt: index + 1,
        ...this.#nameOf(receipt.node_id),
        outcome: receipt.outcome,
        reason: receipt.reason,
        leased_at: receipt.leased_at,
        ended_at: receipt.created_at,
      }));
  }

  reasons(task: TaskRecord, standing: TaskStanding | null): readonly Reason[] {
    switch (task.status) {
      case 'completed':
      case 'failed':
      case 'canceled':
        return [this.#ended(task, task.status)];
      case 'leased':
      case 'running':
        return this.#held(task, task.status, standing);
      case 'queued':
        return this.#queued(task, standing);
      default:
        return task.status satisfies never;
    }
  }

  #ended(task: TaskRecord, code: 'completed' | 'failed' | 'canceled'): Reason {
    const { attempts, max_attempts, reason, updated_at: at } = task;
    const last = this.attempts(task).at(-1);
    const ago = `${this.#ago(at)} ago`;
    const message =
      code === 'completed'
        ? `completed ${ago}${last === undefined ? '' : ` by node ${last.name} in ${span(Date.parse(last.ended_at) - Date.parse(last.leased_at))}`}${attempts > 1 ? `, in attempt ${attempts}` : ''}`
        : code === 'failed'
          ? `failed ${ago} after ${attempts} of ${plural(max_attempts, 'attempt')}: ${reason ?? 'no reason given'}${attempts < max_attempts && attempts > 0 && reason !== 'deadline' ? ' (trying again was said to be of no use)' : ''}`
          : `canceled ${ago}: ${reason ?? 'no reason given'}`;
    const again = this.#job.redriven_as;
    const link = code === 'completed' || again === undefined ? '' : `; ${redrivenAs(again)}`;
    return {
      code,
      reason: code === 'completed' ? null : reason,
      at,
      attempts,
      max_attempts,
      message: message + link,
    };
  }

  #held(task: TaskRecord, code: 'leased' | 'running', standing: TaskStanding | null): Reason[] {
    const node = this.#nameOf(task.reserved_by ?? '');
    const { lease_expires_at, last_heartbeat_at, cancel_requested_at } = task;
    const progress = progressOf(task.meta);
    const since = standing?.leasedAt ?? null;
    const until = lease_expires_at === null ? null : Date.parse(lease_expires_at) - this.#now;
    const lease =
      until === null
        ? ''
        : until > 0
          ? `; the lease ends in ${span(until)} unless renewed`
          : `; the lease ended ${span(-until)} ago and is being taken back`;
    const heard =
      last_heartbeat_at === null
        ? ''
        : `; last heartbeat ${this.#ago(last_heartbeat_at)} ago${progress === null ? '' : `, progress ${short(JSON.stringify(progress))}`}`;
    const doing: Reason = {
      code,
      ...node,
      since,
      lease_expires_at,
      last_heartbeat_at,
      progress,
      message:
        (code === 'running'
          ? `node ${node.name} has been working on it${since === null ? '' : ` for ${this.#ago(since)}`}`
          : `node ${node.name} has taken it${since === null ? '' : ` ${this.#ago(since)} ago`} and has not said yet that it began`) +
        heard +
        lease,
    };
    if (cancel_requested_at === null) {
      const wait = code === 'running' ? this.#waits.get(task.id) : undefined;
      return wait === undefined ? [doing] : [this.#waiting(wait, node), doing];
    }
    const why = task.reason === null ? '' : ` (${task.reason})`;
    return [
      {
        code: 'canceling',
        ...node,
        requested_at: cancel_requested_at,
        lease_expires_at,
        message: `it was asked to end ${this.#ago(cancel_requested_at)} ago${why}; node ${node.name} has not said yet that the work is gone${lease}`,
      },
      doing,
    ];
  }

  #queued(task: TaskRecord, standing: TaskStanding | null): Reason[] {
    const reasons: Reason[] = [];
    if (task.deps_remaining > 0) reasons.push(this.#waitingForStages(task));
    const wait = task.not_before === null ? 0 : Date.parse(task.not_before) - this.#now;
    if (task.not_before !== null && wait > 0 && task.attempts + task.node_faults === 0) {
      reasons.push({
        code: 'waiting_until',
        not_before: task.not_before,
        wait_ms: wait,
        message: `waits until ${task.not_before}, in ${span(wait)}, as it was submitted`,
      });
    } else if (task.not_before !== null && wait > 0) {
      reasons.push({
        code: 'backing_off',
        not_before: task.not_before,
        wait_ms: wait,
        attempts: task.attempts,
        max_attempts: task.max_attempts,
        last_reason: task.reason,
        message: `will be tried again in ${span(wait)}; attempt ${task.attempts + task.node_faults} ended: ${task.reason ?? 'no reason given'} (${task.attempts} of ${plural(task.max_attempts, 'attempt')} used)`,
      });
    }
    const nodes = this.#reasonsOfNodes(task);
    const able = nodes.some(
      ({ code }) => code === 'waiting_for_node' || code === 'slots_busy' || code === 'no_room',
    );
    // Whether somebody has time for it matters when its own time has come; that nobody can do it always does.
    if (reasons.length > 0) return able ? reasons : [...reasons, ...nodes];
    const busy = this.#keyBusy(task, standing);
    if (busy !== null) return able ? [busy] : [busy, ...nodes];
    const ahead = standing?.ahead;
    if (ahead && able && ahead.higherPriority + ahead.older > 0) {
      const { higherPriority: higher_priority, older } = ahead;
      reasons.push({
        code: 'behind_others',
        higher_priority,
        older,
        priority: task.priority,
        message: `${plural(higher_priority + older, 'task')} come before it: ${higher_priority} of higher priority, ${older} of its priority (${task.priority}) and older`,
      });
    }
    return [...nodes.slice(0, 1), ...reasons, ...nodes.slice(1)];
  }

  #keyBusy({ concurrency }: TaskRecord, standing: TaskStanding | null): Reason | null {
    if (concurrency === undefined) return null;
    const { key, limit } = concurrency;
    const running = standing?.heldOfKey ?? this.#heldOfKeys.get(key) ?? 0;
    if (running < limit) return null;
    return {
      code: 'key_busy',
      key,
      limit,
      running,
      message: `${running} of ${limit} tasks with key ${JSON.stringify(key)} are running; it is given out when ${running === limit ? 'one of them ends' : 'there are fewer'}`,
    };
  }

  #waitingForStages(task: TaskRecord): Reason {
    const stages = this.#job.job.edges
      .filter(({ to }) => to === task.stage)
      .map(({ from }) => {
        const { tasks = 0, left = 0 } = this.#stages.get(from) ?? {};
        return { stage: from, tasks_left: left, tasks };
      })
      .filter(({ tasks_left }) => tasks_left > 0);
    const list = stages.map(
      ({ stage, tasks_left, tasks }) => `${stage} (${tasks_left} of ${plural(tasks, 'task')} left)`,
    );
    return {
      code: 'waiting_for_stages',
      stages,
      message: `waits for ${stages.length === 1 ? 'stage' : 'stages'} ${list.join(', ')}`,
    };
  }

  #reasonsOfNodes(task: TaskRecord): readonly Reason[] {
    const key = demandKey(task);
    let reasons = this.#ofNodes.get(key);
    if (reasons === undefined) {
      reasons = this.#judgeNodes(task);
      this.#ofNodes.set(key, reasons);
    }
    return reasons;
  }

  #judgeNodes(task: TaskRecord): Reason[] {
    const { capability, capability_filters: filters, mode, organization_id: organizationId } = task;
    if (this.#nodes.length === 0) {
      return [
        {
          code: 'no_node_registered',
          message:
            'no node has ever registered here; "millrace node start" runs one, "millrace nodes add" makes its credentials',
        },
      ];
    }
    const offering = this.#nodes.filter((node) => node.capabilities.includes(capability));
    if (offering.length === 0) {
      const nearest = nearestNames(capability, new Set(this.#nodes.flatMap((node) => node.capabilities)));
      return [
        {
          code: 'no_node_with_capability',
          capability,
          nearest,
          message:
            `no node offers ${capability}` +
            (nearest.length > 0
              ? `; the nearest offered ${nearest.length === 1 ? 'name is' : 'names are'} ${nearest.join(', ')}`
              : ''),
        },
      ];
    }
    const { resources } = task;
    const demand = { capability, filters, mode, organizationId };
    const labelled: (NodeRecord & { readonly label: string })[] = [];
    const notEntitled: NodeRecord[] = [];
    const away: NodeRecord[] = [];
    const small: (NodeRecord & { readonly lack: Lack })[] = [];
    const cramped: (NodeRecord & { readonly lack: Lack })[] = [];
    const full: NodeRecord[] = [];
    const free: NodeRecord[] = [];
    for (const node of offering) {
      const label = differingLabel(filters, node.labels);
      const lacking = shortage(resources, node.resources);
      const short = lacking ?? shortNow(resources, node);
      if (label !== null) labelled.push({ ...node, label });
      else if (match(demand, { ...node, organizationId: node.organization_id, resources: null }) === 'never')
        notEntitled.push(node);
      else if (lacking !== null) small.push({ ...node, lack: lackOf(lacking) });
      else if (node.active_leases >= node.max_concurrency) full.push(node);
      else if (node.active_leases === 0 && this.#isAway(node)) away.push(node);
      else if (short !== null) cramped.push({ ...node, lack: lackOf(short) });
      else free.push(node);
    }
    if (free.length > 0) {
      return [
        {
          code: 'waiting_for_node',
          count: free.length,
          nodes: free.slice(0, LISTED).map((node) => ({
            ...nameOf(node),
            free_slots: node.max_concurrency - node.active_leases,
          })),
          message: `${names(free)} ${free.length === 1 ? 'has' : 'have'} a free slot and may take it at the next request for work`,
        },
      ];
    }
    const reasons: Reason[] = [];
    if (full.length > 0) {
      reasons.push({
        code: 'slots_busy',
        count: full.length,
        nodes: full.slice(0, LISTED).map((node) => ({
          ...nameOf(node),
          slots: node.max_concurrency,
          in_use: node.active_leases,
        })),
        message: `every slot of ${names(full, (node) => `${node.active_leases} of ${node.max_concurrency}`)} is busy`,
      });
    }
    if (cramped.length > 0) {
      reasons.push({
        code: 'no_room',
        count: cramped.length,
        nodes: cramped.slice(0, LISTED).map(({ lack, ...node }) => ({ ...nameOf(node), ...lack })),
        message: `${names(cramped, ({ lack }) => `${amount(lack, lack.free)} left`)} ${cramped.length === 1 ? 'has' : 'have'} no room for it now: it takes ${needs(cramped)}; once it has waited ${span(OVERTAKING_MS)}, ${cramped.length === 1 ? 'the node takes' : 'these nodes take'} nothing of its priority or below before it`,
      });
    }
    if (away.length > 0) {
      reasons.push({
        code: 'nodes_away',
        count: away.length,
        nodes: away.slice(0, LISTED).map((node) => ({ ...nameOf(node), last_seen_at: node.last_seen_at })),
        message: `${names(away, (node) => (node.last_seen_at === null ? 'never asked for work' : `last seen ${this.#ago(node.last_seen_at)} ago`))} could do it but ${away.length === 1 ? 'is' : 'are'} away`,
      });
    }
    if (notEntitled.length > 0) {
      reasons.push({
        code: 'node_not_entitled',
        mode,
        organization_id: organizationId,
        count: notEntitled.length,
        nodes: notEntitled.slice(0, LISTED).map((node) => ({
          ...nameOf(node),
          mode: node.mode,
          organization_id: node.organization_id,
        })),
        message: `${names(notEntitled, (node) => `${node.mode}, of ${node.organization_id}`)} may not take it: the task is ${mode} and of ${organizationId ?? 'no organization'}; dedicated nodes serve their own organization, public nodes public tasks`,
      });
    }
    if (small.length > 0) {
      reasons.push({
        code: 'node_too_small',
        count: small.length,
        nodes: small.slice(0, LISTED).map(({ lack, ...node }) => ({ ...nameOf(node), ...lack })),
        message: `${names(small, ({ lack }) => (lack.free === 0 ? `registered no ${lack.resource}` : `has ${amount(lack, lack.free)}`))} ${small.length === 1 ? 'is' : 'are'} too small: it takes ${needs(small)}`,
      });
    }
    if (labelled.length > 0) {
      reasons.push({
        code: 'label_differs',
        count: labelled.length,
        nodes: labelled.slice(0, LISTED).map(({ label, ...node }) => ({
          ...nameOf(node),
          label,
          wanted: wantedOf(filters[label]),
          found: Object.hasOwn(node.labels, label) ? (node.labels[label] ?? null) : null,
        })),
        message: `the task wants ${Object.entries(filters)
          .map(([name, value]) => `${name}${typeof value === 'string' ? '=' : ' '}${wantedOf(value)}`)
          .join(
            ', ',
          )}, but ${names(labelled, (node) => (Object.hasOwn(node.labels, node.label) ? `${node.label}=${node.labels[node.label]}` : `no label ${node.label}`))}`,
      });
    }
    return reasons;
  }

  #isAway(node: NodeRecord): boolean {
    return node.last_seen_at === null || this.#now - Date.parse(node.last_seen_at) > AWAY_AFTER_MS;
  }

  #waiting(wait: NodeWait, node: NodeName): Reason {
    if (wait.kind === 'slot') {
      const since = isoTime(wait.since);
      return {
        code: 'waiting_for_slot',
        ...node,
        slot: wait.slot,
        since,
        message: `node ${node.name} has it, and it has waited there for ${this.#ago(since)} until slot ${wait.slot} is free`,
      };
    }
    const waitMs = Math.max(0, wait.until - this.#now);
    const { tries, failure } = wait;
    return {
      code: 'between_tries',
      ...node,
      tries,
      not_before: isoTime(wait.until),
      wait_ms: waitMs,
      last_reason: failure,
      message: `node ${node.name} has it, and ${waitMs === 0 ? 'is about to try it again' : `tries it again in ${span(waitMs)}, at ${isoTime(wait.until)}`}: try ${tries} ${failure === null ? 'did its work, and it always restarts' : `failed, ${failure}`}`,
    };
  }

  #nameOf(nodeId: string): NodeName {
    return { node_id: nodeId, name: this.#names.get(nodeId) ?? nodeId };
  }

  #ago(iso: string): string {
    return span(this.#now - Date.parse(iso));
  }
}

/** What the task takes more of than the node has left beside what it does now. */
function shortNow(
  demand: TaskRecord['resources'],
  { resources, resources_in_use }: NodeRecord,
): Shortage | null {
  if (resources === undefined) return null;
  const usage = new Usage(resources);
  if (resources_in_use !== undefined) usage.addTaken(resources_in_use);
  return usage.shortage(demand);
}

function lackOf({ name, needed, free }: Shortage): Lack {
  return { resource: name, needed, free };
}

/** What is lacking somewhere, each once. */
function needs(nodes: readonly { readonly lack: Lack }[]): string {
  return [...new Set(nodes.map(({ lack }) => amount(lack, lack.needed)))].join(', ');
}

const UNITS = ['TiB', 'GiB', 'MiB', 'KiB'];

/** `2 cpu`, `512 MiB of memory`. */
function amount({ resource }: Lack, value: number): string {
  if (resource !== 'memory') return `${value} ${resource}`;
  const at = UNITS.findIndex((_, index) => value >= 1024 ** (UNITS.length - index));
  const size = 1024 ** (UNITS.length - at);
  return at === -1
    ? `${value} bytes of memory`
    : `${Number((value / size).toFixed(2))} ${UNITS[at]} of memory`;
}

/** A filter in a line: a value, or its operators as they were written. */
function wantedOf(filter: CapabilityFilters[string] | undefined): string {
  return typeof filter === 'string' ? filter : JSON.stringify(filter ?? '');
}

function nameOf(node: NodeRecord): NodeName {
  return { node_id: node.id, name: node.name };
}

/** `node a`, `nodes a and b`, `nodes a, b and 3 more`, each with a remark. */
function names<N extends NodeRecord>(nodes: readonly N[], remark?: (node: N) => string): string {
  const shown = nodes
    .slice(0, 3)
    .map((node) => node.name + (remark === undefined ? '' : ` (${remark(node)})`));
  const more = nodes.length - shown.length;
  if (more > 0) shown.push(`${more} more`);
  const last = shown.pop() ?? '';
  const list = shown.length === 0 ? last : `${shown.join(', ')} and ${last}`;
  return `${nodes.length === 1 ? 'node' : 'nodes'} ${list}`;
}

const PROGRESS_SHOWN = 120;

function short(text: string): string {
  return text.length <= PROGRESS_SHOWN ? text : `${text.slice(0, PROGRESS_SHOWN)}…`;
}

/** What heartbeats brought is shown in the meta of a task that has an object there. */
function progressOf(meta: Json): Json {
  return typeof meta === 'object' && meta !== null && !Array.isArray(meta)
    ? (meta['progress'] ?? null)
    : null;
}

function plural(count: number, word: string): string {
  return `${count} ${word}${count === 1 ? '' : 's'}`;
}

/** A time span as people say it: `350 ms`, `12 s`, `5 min`, `3 h`, `2 d`. */
function span(ms: number): string {
  const value = Math.max(0, ms);
  if (value < 1_000) return `${Math.round(value)} ms`;
  if (value < 100_000) return `${Math.round(value / 1_000)} s`;
  if (value < 100 * 60_000) return `${Math.round(value / 60_000)} min`;
  if (value < 48 * 3_600_000) return `${Math.round(value / 3_600_000)} h`;
  return `${Math.round(value / 86_400_000)} d`;
}

function isoTime(ms: number): string {
  return new Date(ms).toISOString();
}

/** Names compared with; a fleet that offers more has other troubles than spelling. */
const MAX_COMPARED = 500;

/** Up to three names spelled like `wanted`: a third of the characters may differ. */
export function nearestNames(wanted: string, offered: ReadonlySet<string>): string[] {
  const limit = Math.max(2, Math.floor(wanted.length / 3));
  return [...offered]
    .slice(0, MAX_COMPARED)
    .map((name) => ({ name, distance: editDistance(wanted, name, limit) }))
    .filter(({ distance }) => distance <= limit)
    .toSorted((a, b) => a.distance - b.distance || (a.name < b.name ? -1 : 1))
    .slice(0, 3)
    .map(({ name }) => name);
}

/** Insertions, deletions and replacements between two texts (Levenshtein), or more than `limit` when there are more. */
function editDistance(a: string, b: string, limit: number): number {
  if (Math.abs(a.length - b.length) > limit) return limit + 1;
  let row = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (let i = 1; i <= a.length; i += 1) {
    const next = [i];
    for (let j = 1; j <= b.length; j += 1) {
      next.push(
        Math.min(
          (row[j] ?? 0) + 1,
          (next[j - 1] ?? 0) + 1,
          (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1),
        ),
      );
    }
    row = next;
  }
  return row[b.length] ?? limit + 1;
}
