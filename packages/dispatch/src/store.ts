/**
 * The seam between the dispatcher and its database: about twenty-five verbs, batch first, each one transaction's
 * worth of meaning. Implementations: `stores/sqlite.ts` for one machine, `stores/postgres.ts` for any number of dispatchers.
 * `stores/suite.ts` proves any of them.
 *
 * What every implementation promises:
 * - A verb resolves after its effects are committed and synced; concurrent calls may share one commit.
 * - The store's clock judges leases, retries and deadlines.
 * - A batch verb answers each item on its own: one item's error changes nothing for the others.
 * - A write under a lease is accepted only while that lease is its task's newest ({@link LeaseRef}). One that expired is that
 *   until another node takes the task, and is resumed by the write (`lifecycle.ts`).
 * - Listeners hear of a change after it is committed, never before.
 */
import type { Json, JsonObject, MillraceError } from '@millrace/runner';
import type {
  BusyNode,
  CapabilityFilters,
  ComputeRecord,
  DataRecord,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  JobStatus,
  NodeMode,
  NodeRecord,
  ScheduleOutcome,
  ScheduleRecord,
  TaskRecord,
  TasksSummary,
} from './records.ts';
import type { Resources } from './resources.ts';

/** The answer to one item of a batch. */
export type Outcome<T> =
  { readonly ok: true; readonly value: T } | { readonly ok: false; readonly error: MillraceError };

/**
 * Names a lease. Our nodes send the lease id. A reference node knows only itself and the task: then `leaseId` is
 * null, and the task's newest lease is meant if it is or was `nodeId`'s.
 */
export interface LeaseRef {
  readonly taskId: string;
  readonly nodeId: string;
  readonly leaseId: string | null;
}

export interface NewJob {
  readonly spec: JobSpec;
  readonly organizationId: string | null;
  /**
   * The same key from the same submitter with the same spec gives the first job's id again; with another spec it
   * is `already_exists`. 1 to 128 visible ASCII characters. `submitter` scopes it.
   */
  readonly idempotencyKey: string | null;
  readonly submitter: string;
  /** The W3C `traceparent` that the leases of its tasks name. No part of the spec. Default none. */
  readonly traceparent?: string | null;
}

export interface LeaseRequest {
  readonly nodeId: string;
  /** At most this many; the node's `max_concurrency` bounds it too. */
  readonly max: number;
  /** Only these, if given; always within what the node registered. */
  readonly capabilities: readonly string[] | null;
  /** Ours: the tasks are `running` at once, as if their first heartbeat had come. Saves one round trip and commit. */
  readonly start: boolean;
}

/** One granted lease with all the server needs to build the envelope. */
export interface GrantedLease {
  readonly leaseId: string;
  readonly expiresAt: string;
  readonly domainId: string;
  readonly task: TaskRecord;
  /** As submitted with the job. Null or absent: the job is not traced. */
  readonly traceparent?: string | null;
}

export interface LeaseAnswer {
  readonly leases: readonly GrantedLease[];
  /** True when nothing was given because the node already holds as many leases as it may: the wire's 409. */
  readonly busy: boolean;
}

export interface HeartbeatItem extends LeaseRef {
  /** Newest progress; null leaves the stored one. */
  readonly progress: Json;
  readonly events: readonly Json[];
  /** The events are lines of the attempt's log as well, and marked so (`logged`) where they are told. Default false. */
  readonly logged?: boolean;
}

export interface HeartbeatAnswer {
  readonly leaseId: string;
  readonly expiresAt: string;
  /** The job was cancelled, or the task's deadline passed: end the work and release with reason `canceled`. */
  readonly cancel: boolean;
  readonly domainId: string;
  readonly task: TaskRecord;
}

export interface CompleteItem extends LeaseRef {
  readonly outputCids: readonly string[];
  readonly meta: Json;
}

export interface FailItem extends LeaseRef {
  readonly reason: string;
  readonly details: Json;
  /** False: no retry, whatever attempts are left. */
  readonly retryable: boolean;
  /** True for `node_setup_failed`: the node's fault, not the task's. */
  readonly nodeFault: boolean;
}

/** Bytes for the log of one attempt: what its lease's task said. */
export interface LogAppend extends LeaseRef {
  /** Where in the log the bytes begin. Where they overlap what is kept already, what is kept stays. */
  readonly offset: number;
  /** At least one; whole lines, each ended by a line feed. */
  readonly bytes: Uint8Array;
}

export interface LogQuery {
  readonly taskId: string;
  /** Counted from 1 over all leases the task had, also those that did not count as attempts; null: the newest. */
  readonly attempt: number | null;
  /** The first byte wanted; below 0 it counts from the end, and is cut to the beginning. */
  readonly offset: number;
  /** Bytes at most, at least 1. */
  readonly limit: number;
}

export interface LogPage {
  readonly jobId: string;
  /** The attempt these bytes are of; the first, when the newest was asked for and there is none yet. */
  readonly attempt: number;
  /** Attempts begun so far. */
  readonly attempts: number;
  /** Of the first byte. */
  readonly offset: number;
  readonly bytes: Uint8Array;
  /** Bytes the log has now. */
  readonly size: number;
  /** No more bytes will be added. */
  readonly ended: boolean;
  /** The task has ended: there will be no attempt after {@link attempts}. */
  readonly final: boolean;
}

/** An attempt that has a log. */
export interface LogEntry {
  readonly taskId: string;
  readonly attempt: number;
  readonly size: number;
}

/** What a task's record does not tell about where it stands. */
export interface TaskStanding {
  readonly jobId: string;
  readonly domainId: string;
  /** Leases it had, the current one included, whether or not they counted as attempts. */
  readonly attempts: number;
  /** Since when the current lease is held. */
  readonly leasedAt: string | null;
  readonly final: boolean;
  /** Tasks of its domain that wait for the same kind of node and come before it; null unless a node may take it now. */
  readonly ahead: { readonly higherPriority: number; readonly older: number } | null;
  /** Tasks that are leased or running with the key of its concurrency limit, itself included; absent: it has none. */
  readonly heldOfKey?: number;
}

/** `shutdown`: the node drains. `canceled`: the work of a cancelled task is gone. */
export interface ReleaseItem extends LeaseRef {
  readonly reason: 'shutdown' | 'canceled' | 'setup_failed';
  /** Kept as the `meta` of the attempt's receipt. Default none. */
  readonly details?: Json;
}

export interface SweepAnswer {
  /** Leases taken back because they expired. */
  readonly rescued: number;
  /** When the next lease expires, retry becomes due or deadline passes; null if nothing is waiting. Epoch ms. */
  readonly nextAtMs: number | null;
}

export interface ListJobsQuery {
  readonly domainId: string | null;
  readonly status: JobStatus | null;
  readonly capabilities: readonly string[];
  readonly matchAllCapabilities: boolean;
  /** 1 to 100. */
  readonly limit: number;
  /** As returned; null starts with the newest job. */
  readonly cursor: string | null;
}

export interface PruneQuery {
  /** Only jobs that ended at least so long ago. */
  readonly endedForMs: number;
  /** Data items made under the job's leases go with it. */
  readonly artifacts: boolean;
  /** As returned; null begins with the oldest job. */
  readonly cursor: string | null;
}

export interface PruneAnswer {
  /** Removed. */
  readonly jobs: number;
  readonly items: number;
  /** Where the next batch begins; null: all jobs that are old enough were looked at. */
  readonly nextCursor: string | null;
}

export interface DeadTasksQuery {
  readonly domainId: string | null;
  readonly jobId: string | null;
  readonly capability: string | null;
  /** 1 to 100. */
  readonly limit: number;
  /** As returned; null starts with the newest job. */
  readonly cursor: string | null;
}

export interface NewSchedule {
  readonly name: string;
  readonly cron: string;
  readonly timeZone: string;
  readonly catchUp: ScheduleRecord['catch_up'];
  readonly overlap: ScheduleRecord['overlap'];
  /** Its domain is the schedule's. */
  readonly job: JobSpec;
  readonly organizationId: string | null;
  /** The first tick, epoch ms. */
  readonly nextAtMs: number | null;
  /** One of the same name goes. Else that is `already_exists`. */
  readonly replace: boolean;
}

/** A schedule whose tick is due, claimed for the caller. */
export interface DueSchedule {
  readonly schedule: ScheduleRecord;
  /** Of this schedule and of no other that ever has the name. */
  readonly revision: string;
  readonly organizationId: string | null;
  /** Where it stands, epoch ms. */
  readonly tickMs: number;
  /** The store's time when it was claimed. */
  readonly nowMs: number;
}

export interface ClaimedSchedules {
  /** The earliest first; at most a hundred. */
  readonly due: readonly DueSchedule[];
  /** When to look again, epoch ms; null: nothing will be due. */
  readonly nextAtMs: number | null;
}

export interface EndedTick {
  readonly revision: string;
  /** Where the schedule stood. */
  readonly tickMs: number;
  /** The last tick that this settles, at or after {@link tickMs}. */
  readonly lastTickMs: number;
  readonly nextAtMs: number | null;
  readonly outcome: ScheduleOutcome;
  /** null keeps the one before. */
  readonly jobId: string | null;
}

/** A node is online while it holds a lease, and this long after it last asked for work. */
export const NODE_ONLINE_MS = 60_000;

export interface NewNode {
  readonly name: string;
  readonly mode: NodeMode;
  readonly organizationId: string;
  /** SHA-256 hex of the registration secret; the secret itself is never stored. */
  readonly secretHash: string;
}

export interface NodeRegistration {
  readonly nodeId: string;
  readonly secretHash: string;
  readonly wallet: string;
  readonly capabilities: readonly string[];
  readonly labels: Readonly<Record<string, string>>;
  readonly version: string;
  /** null: 1, as the reference has it. */
  readonly maxConcurrency: number | null;
  /** What it has to give. Null or absent: it does not say. */
  readonly resources?: Resources | null;
}

export interface Nonce {
  readonly nonce: string;
  readonly wallet: string;
  readonly domain: string;
  readonly uri: string;
  readonly chainId: number;
  readonly issuedAt: string;
  readonly expiresAtMs: number;
}

/** Bytes to be named: already in the blob store, or small and given with their name. */
export interface DataWrite {
  readonly domainId: string;
  /** Replace this record; null creates. */
  readonly id: string | null;
  /** On create: the id to give it, as promised by a chunked upload's `dataId`. Default: a fresh one. */
  readonly createId?: string;
  /** null on replace keeps the old one. */
  readonly name: string | null;
  readonly dataType: string | null;
  readonly digest: string;
  readonly size: number;
  /** The bytes themselves, for a store that keeps small ones ({@link Store.small}). Absent: they are in the blob store. */
  readonly bytes?: Uint8Array;
  /** The lease it is written under; null for a requestor. Checked like every write under a lease. */
  readonly lease: LeaseRef | null;
  /** On create: replace a record of the same name instead of answering `already_exists`. */
  readonly replaceByName: boolean;
  /**
   * With a lease: replace only what was created under a lease of the same job, else `permission_denied`. For tasks
   * with an outputs prefix, which confines them to their own. Default false.
   */
  readonly ownOnly?: boolean;
}

/**
 * Bytes that came with the items that name them ({@link DataWrite.bytes}): durable by the same commit, and gone with the last item
 * that names them.
 */
export interface SmallBytes {
  /** Larger ones go to the blob store. */
  readonly maxBytes: number;
  /** As they are stored: whoever serves them checks their digest. Null when they are not kept here. */
  get(digest: string): Promise<Uint8Array | null>;
}

export interface DataQuery {
  readonly domainId: string;
  /** In this order; empty means no filter by id. */
  readonly ids: readonly string[];
  readonly name: string | null;
  readonly dataType: string | null;
  readonly limit: number;
}

/** Bytes already in the blob store, to be known as code. */
export interface ComputeWrite {
  /** `sha256:<hex>`, as the blob store names them. */
  readonly digest: string;
  readonly engine: string;
  readonly size: number;
}

export interface PutComputeAnswer {
  readonly compute: ComputeRecord;
  /** False: it was there. */
  readonly created: boolean;
}

export interface ListComputesQuery {
  readonly limit: number;
  /** As returned; null starts with the newest. */
  readonly cursor: string | null;
}

/** A chunked upload under way. */
export interface UploadRecord {
  readonly id: string;
  readonly domainId: string;
  readonly name: string;
  readonly dataType: string;
  readonly size: number | null;
  readonly existingId: string | null;
  /** The id the finished item will have. */
  readonly dataId: string;
  readonly partSize: number;
  readonly expiresAtMs: number;
  readonly lease: LeaseRef | null;
  readonly parts: readonly { readonly partNumber: number; readonly etag: string; readonly size: number }[];
}

/** Those who wait for work. Both are called in one synchronous step, in this order; the second only if it was committed. */
export interface Standby {
  /** A transaction has made tasks runnable and is about to commit: who shall be given some of them? In this order. */
  requests(): readonly LeaseRequest[];
  /** Committed. The answers, in the order of the requests; before listeners hear of the change. */
  granted(outcomes: readonly Outcome<LeaseAnswer>[]): void;
}

export type StoreChange =
  | { readonly kind: 'runnable' }
  | { readonly kind: 'job'; readonly jobId: string }
  /** The logs of these tasks have grown. */
  | { readonly kind: 'logs'; readonly taskIds: readonly string[] }
  | { readonly kind: 'cancel'; readonly leaseIds: readonly string[] }
  /** Changes may have been missed: whoever waits for anything should look again. Only a store shared by processes says it. */
  | { readonly kind: 'anything' };

/** How much work waits that makes the same demands on a node. */
export interface QueueStanding {
  readonly capability: string;
  readonly filters: CapabilityFilters;
  readonly mode: NodeMode;
  readonly organizationId: string | null;
  /** Absent: they name none. */
  readonly resources?: Resources;
  /** A node may take them. */
  readonly ready: number;
  /** Of these, those that wait because as many tasks of their key are held as their limit allows. */
  readonly limited: number;
  /** Wait for an earlier stage. */
  readonly blocked: number;
  /** Wait for their time, as submitted or after a failed attempt. */
  readonly delayed: number;
  /** Leased or running. */
  readonly held: number;
  /** How long the oldest of those that are ready has waited. */
  readonly oldestReadyAgeMs: number | null;
}

/** Where the open leases and their tasks stand, for `/metrics` and `doctor`. */
export interface StoreStats {
  readonly tasks: TasksSummary;
  readonly jobs: Readonly<Record<JobStatus, number>>;
  readonly oldestRunnableAgeMs: number | null;
}

export interface Store extends AsyncDisposable {
  // Jobs. Specs were validated by the caller.
  submit(jobs: readonly NewJob[]): Promise<Outcome<{ readonly jobId: string; readonly created: boolean }>[]>;
  getJob(id: string): Promise<JobDetail | null>;
  getTask(id: string): Promise<TaskRecord | null>;
  listJobs(query: ListJobsQuery): Promise<{
    readonly items: readonly { readonly job: JobRecord; readonly tasks_summary: TasksSummary }[];
    readonly nextCursor: string | null;
  }>;
  /** Queued tasks end now; leased ones are asked to end. Null: unknown job. A finished job is left as it is. */
  cancelJob(id: string): Promise<JobRecord | null>;
  /** @throws MillraceError `failed_precondition` while a task of it is leased. False: unknown job. */
  deleteJob(id: string): Promise<boolean>;
  /**
   * Removes jobs that ended long ago, one batch of the oldest: with their events, logs and receipts, and what could be given
   * again from them. A job that an unfinished job does again, directly or over others, stays.
   */
  pruneJobs(query: PruneQuery): Promise<PruneAnswer>;
  /** The job as it was submitted, but for `stage:` inputs that have become data ids since. Null: unknown job. */
  submission(jobId: string): Promise<JobSpec | null>;
  /** Tasks that failed for good, those of the newest job first. */
  deadTasks(
    query: DeadTasksQuery,
  ): Promise<{ readonly items: readonly TaskRecord[]; readonly nextCursor: string | null }>;
  /** Events with `seq > after`, in order. Null: unknown job. */
  events(jobId: string, after: number, limit: number): Promise<readonly JobEvent[] | null>;

  // Leases.
  lease(requests: readonly LeaseRequest[]): Promise<Outcome<LeaseAnswer>[]>;
  heartbeat(items: readonly HeartbeatItem[]): Promise<Outcome<HeartbeatAnswer>[]>;
  complete(items: readonly CompleteItem[]): Promise<Outcome<{ readonly leaseId: string }>[]>;
  fail(items: readonly FailItem[]): Promise<Outcome<{ readonly leaseId: string }>[]>;
  release(items: readonly ReleaseItem[]): Promise<Outcome<{ readonly leaseId: string }>[]>;
  /**
   * Of these leases, those whose node should ask at once how they stand: cancelled, or not held any more. Work under one that
   * only expired may go on: the answer to its next heartbeat decides.
   */
  canceledLeases(nodeId: string, leaseIds: readonly string[]): Promise<readonly string[]>;
  /** Takes back expired leases, makes due retries runnable, fails tasks past their deadline. */
  sweep(): Promise<SweepAnswer>;

  // Logs of attempts. They go with their job.
  /**
   * Appends to logs, each under its lease. Saying again what is kept is harmless, whatever became of the answer. A log keeps
   * at most `maxBytes`. Errors of an item: as for every write under a lease; `failed_precondition` with
   * `details.next_offset` when bytes are missing before `offset`; `resource_exhausted` past `maxBytes`.
   */
  appendLogs(
    items: readonly LogAppend[],
    maxBytes: number,
  ): Promise<Outcome<{ readonly nextOffset: number }>[]>;
  /**
   * Null: unknown task. An attempt that is the next to come is empty.
   *
   * @throws MillraceError `not_found` for attempts further away, `invalid_argument` for an offset past the end
   */
  readLogs(query: LogQuery): Promise<LogPage | null>;
  /** The job's attempts that said something, by task and attempt. Null: unknown job. */
  listLogs(jobId: string): Promise<readonly LogEntry[] | null>;
  /** Null: unknown task. */
  standing(taskId: string): Promise<TaskStanding | null>;

  // Jobs that are submitted at set times.
  /** @throws MillraceError `already_exists`; `resource_exhausted` at a thousand schedules */
  putSchedule(schedule: NewSchedule): Promise<ScheduleRecord>;
  /** By domain and name; null: of all domains. */
  listSchedules(domainId: string | null): Promise<readonly ScheduleRecord[]>;
  getSchedule(domainId: string, name: string): Promise<ScheduleRecord | null>;
  deleteSchedule(domainId: string, name: string): Promise<boolean>;
  /** Claims what is due for so long: until then, or until its tick is ended, nobody else gets it. */
  claimSchedules(claimMs: number): Promise<ClaimedSchedules>;
  /** Moves a schedule on, if it still stands where it stood. */
  endTick(tick: EndedTick): Promise<boolean>;

  // Domains, which take turns.
  /** `weight` 1 is that of a domain that was never given one. @throws MillraceError `invalid_argument` */
  setWeight(domainId: string, weight: number): Promise<void>;
  /** By id: those with another weight than 1, or with tasks that are ready or held. */
  domains(): Promise<readonly DomainStanding[]>;

  // Nodes and their identity.
  createNode(node: NewNode): Promise<NodeRecord>;
  /** False too when there is no such node, so that ids cannot be probed. */
  nodeHasSecret(nodeId: string, secretHash: string): Promise<boolean>;
  /**
   * @throws MillraceError `unauthenticated` wrong id or secret; `already_exists` the wallet belongs to another node, or the
   * node is online with another wallet ({@link NODE_ONLINE_MS}).
   */
  registerNode(registration: NodeRegistration): Promise<NodeRecord>;
  getNode(id: string): Promise<NodeRecord | null>;
  findNodeByWallet(wallet: string): Promise<NodeRecord | null>;
  /** Notes that the node asked for work; may be written at most every few seconds. */
  touchNode(id: string): Promise<void>;
  listNodes(): Promise<readonly NodeRecord[]>;
  busyNodes(mode: NodeMode | 'all'): Promise<readonly BusyNode[]>;
  /** Live nonces are bounded; at the bound it is `resource_exhausted`. */
  putNonce(nonce: Nonce): Promise<void>;
  /** The nonce, which is gone afterwards whoever asks; null when unknown, used or expired. */
  takeNonce(nonce: string): Promise<Nonce | null>;
  /** The value of a setting; `create` gives it the first time, and all callers get the one that won. */
  setting(name: string, create: () => JsonObject): Promise<JsonObject>;

  // Data items and chunked uploads. The bytes are in the blob store, but for those of {@link Store.small}.
  /** All of them or, when one is refused, none. Two writes of one call must not be for the same item or name. */
  putData(writes: readonly DataWrite[]): Promise<readonly DataRecord[]>;
  getData(domainId: string, id: string): Promise<DataRecord | null>;
  findData(query: DataQuery): Promise<readonly DataRecord[]>;
  deleteData(domainId: string, id: string): Promise<boolean>;
  createUpload(upload: Omit<UploadRecord, 'parts'>): Promise<void>;
  getUpload(domainId: string, id: string): Promise<UploadRecord | null>;
  /** Replaces a part of the same number. */
  putPart(
    uploadId: string,
    part: { readonly partNumber: number; readonly etag: string; readonly size: number },
  ): Promise<void>;
  /** Forgets the upload; false when unknown. Expired ones are listed by {@link expiredUploads}. */
  deleteUpload(id: string): Promise<boolean>;
  expiredUploads(limit: number): Promise<readonly UploadRecord[]>;
  /** Of these digests, those that no data item names and no compute has. */
  unreferencedDigests(digests: readonly string[]): Promise<readonly string[]>;
  /** Absent where all bytes are in the blob store. */
  readonly small?: SmallBytes;

  // Computes. The bytes are in the blob store; digests are `sha256:<hex>`.
  /** Keeps one that is there. @throws MillraceError `already_exists` when it is there for another engine. */
  putCompute(compute: ComputeWrite): Promise<PutComputeAnswer>;
  getCompute(digest: string): Promise<ComputeRecord | null>;
  listComputes(
    query: ListComputesQuery,
  ): Promise<{ readonly items: readonly ComputeRecord[]; readonly nextCursor: string | null }>;
  /** False: there was none. Its bytes go with the next collection, unless a data item names them. */
  deleteCompute(digest: string): Promise<boolean>;
  /** Of these digests, those that no compute has, in the order given. */
  missingComputes(digests: readonly string[]): Promise<readonly string[]>;

  stats(): Promise<StoreStats>;
  /** By what they demand of a node, the tasks that have not ended; nothing for demands without any. */
  queues(): Promise<readonly QueueStanding[]>;
  /** Calls `listener` after each commit that changed something of interest. */
  subscribe(listener: (change: StoreChange) => void): Disposable;
  /**
   * Lets requests that wait for work share the commit that makes tasks runnable, instead of one more commit after it. Only
   * for a store whose commit is one synchronous step; any other never calls, and its waiters ask with {@link lease}
   * when they hear of the change.
   */
  standBy(standby: Standby): Disposable;
}
