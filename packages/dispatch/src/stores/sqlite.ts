/**
 * The store for one machine: SQLite in WAL mode with full sync, one process, one writer. Concurrent calls share commits
 * (`group-commit.ts`); the rules are in `lifecycle.ts`, their rows in `sqlite-work.ts`.
 *
 * Reads answer at once from the committed state: operations run synchronously from BEGIN to COMMIT, so between two turns of
 * the event loop there is nothing else to see. With clock, random source and schedule given, everything is deterministic.
 */
import { systemClock } from '@millrace/runner';
import type { Clock, JsonObject, Logger, Random } from '@millrace/runner';
import { DEFAULT_BACKOFF } from '../lifecycle.ts';
import type { Backoff } from '../lifecycle.ts';
import type {
  BusyNode,
  ComputeRecord,
  DataRecord,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  NodeMode,
  NodeRecord,
  ScheduleRecord,
  TaskRecord,
} from '../records.ts';
import type {
  ClaimedSchedules,
  CompleteItem,
  ComputeWrite,
  DataQuery,
  DataWrite,
  DeadTasksQuery,
  EndedTick,
  FailItem,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRequest,
  ListComputesQuery,
  ListJobsQuery,
  LogAppend,
  LogEntry,
  LogPage,
  LogQuery,
  NewJob,
  NewNode,
  NewSchedule,
  NodeRegistration,
  Nonce,
  Outcome,
  PruneAnswer,
  PruneQuery,
  PutComputeAnswer,
  QueueStanding,
  ReleaseItem,
  SmallBytes,
  Standby,
  Store,
  StoreChange,
  StoreStats,
  SweepAnswer,
  TaskStanding,
  UploadRecord,
} from '../store.ts';
import { parseCursor } from './cursors.ts';
import { GroupCommit, closedError } from './group-commit.ts';
import type { Schedule, Transaction } from './group-commit.ts';
import { uuidV7 } from './ids.ts';
import { SMALL_BYTES, SmallItems } from './sqlite-bytes.ts';
import { Computes } from './sqlite-computes.ts';
import { Data, type DataLeases } from './sqlite-data.ts';
import { Database } from './sqlite-database.ts';
import { Logs } from './sqlite-logs.ts';
import { Nodes } from './sqlite-nodes.ts';
import { Schedules } from './sqlite-schedules.ts';
import { SWEEP_TASKS, Work } from './sqlite-work.ts';

export interface SqliteStoreOptions {
  /** The database file, created when absent; `:memory:` for one that ends with the process. */
  readonly path: string;
  /** Default: the machine's. */
  readonly clock?: Clock;
  /** Default: `Math.random`. Ids and backoff come from it; neither is a secret. */
  readonly random?: Random;
  /** Runs the next transaction. Default `setImmediate`; simulations give a microtask. */
  readonly schedule?: Schedule;
  /** How long a lease lives without a heartbeat. Default 15,000 ms. */
  readonly leaseTtlMs?: number;
  /** How long heartbeats keep a cancelled lease alive after the request. Default 60,000 ms. */
  readonly cancelGraceMs?: number;
  /** Between the attempts of a task. Default: up to 1 s after the first, doubling, at most 60 s. */
  readonly backoff?: Backoff;
  /** The database file may grow to this many bytes; then writes are refused as on a full disk. Default: unbounded. */
  readonly maxBytes?: number;
  readonly log?: Logger;
}

/**
 * Opens or creates the database, applies missing migrations and takes the file for this process.
 *
 * @throws MillraceError `failed_precondition` when another process has the file open, it is not a Millrace database or
 * a newer Millrace wrote it; `unavailable` when it cannot be opened.
 */
export function openSqliteStore(options: SqliteStoreOptions): Promise<Store> {
  // Asynchronous by contract: another store has to connect. Errors reject like everywhere else.
  return new Promise((resolve) => resolve(new SqliteStore(options)));
}

/** Jobs one stretch of a filtered listing looks at before it lets others run. */
const LIST_SPAN = 2000;

/** A batch of a pruning shares its commit with nothing large. */
const PRUNE_WEIGHT = 2000;

/** So many bytes of a small item take about as long to write as one task. */
const BYTES_LIKE_A_TASK = 2048;

class SqliteStore implements Store {
  readonly small: SmallBytes;
  readonly #database: Database;
  readonly #work: Work;
  readonly #nodes: Nodes;
  readonly #data: Data;
  readonly #computes: Computes;
  readonly #logs: Logs;
  readonly #schedules: Schedules;
  readonly #group: GroupCommit;
  readonly #schedule: Schedule;
  readonly #log: Logger | undefined;
  readonly #listeners = new Set<(change: StoreChange) => void>();
  readonly #standbys = new Set<Standby>();
  /** What the transaction under way grants to those who wait. */
  #grants: { readonly standby: Standby; readonly outcomes: readonly Outcome<LeaseAnswer>[] }[] = [];
  /** The memory does not match the tables: a rollback happened. */
  #stale = true;
  #open = true;
  #closing: Promise<void> | null = null;

  constructor(options: SqliteStoreOptions) {
    const clock = options.clock ?? systemClock;
    const random = options.random ?? Math.random;
    const newId = uuidV7(clock, random);
    this.#log = options.log;
    this.#schedule = options.schedule ?? ((run) => void setImmediate(run));
    this.#database = new Database(options.path, clock.now(), options.maxBytes);
    this.#work = new Work(this.#database, {
      clock,
      random,
      newId,
      leaseTtlMs: options.leaseTtlMs ?? 15_000,
      cancelGraceMs: options.cancelGraceMs ?? 60_000,
      backoff: options.backoff ?? DEFAULT_BACKOFF,
      items: {
        get: (domainId, id) => this.#data.get(domainId, id),
        copy: (jobId, items) => this.#data.copy(jobId, items),
      },
      node: (id) => this.#nodes.get(id),
    });
    this.#nodes = new Nodes(
      this.#database,
      clock,
      newId,
      (nodeId) => this.#work.activeLeases(nodeId),
      (node) => this.#work.inUse(node),
    );
    const small = new SmallItems(this.#database);
    this.small = { maxBytes: SMALL_BYTES, get: (digest) => this.#read(() => small.get(digest)) };
    const leases: DataLeases = {
      check: (ref, domainId) => this.#work.checkLease(ref, domainId),
      keep: (ref) => this.#work.keepLease(ref),
    };
    this.#data = new Data(this.#database, clock, newId, leases, small);
    this.#computes = new Computes(this.#database, clock);
    this.#schedules = new Schedules(this.#database, clock, newId);
    this.#logs = new Logs(this.#database, {
      leased: (item) => this.#work.leased(item),
      keep: (item) => this.#work.keepLease(item),
      standing: (taskId) => this.#work.standing(taskId, false),
    });
    this.#group = new GroupCommit(this.#transaction(), this.#schedule);
    this.#refresh();
  }

  submit(jobs: readonly NewJob[]): Promise<Outcome<{ readonly jobId: string; readonly created: boolean }>[]> {
    const tasks = jobs.reduce((sum, job) => sum + job.spec.tasks.length, 0);
    return this.#group.run(tasks, () => this.#work.submit(jobs));
  }

  getJob(id: string): Promise<JobDetail | null> {
    return this.#read(() => this.#work.getJob(id));
  }

  getTask(id: string): Promise<TaskRecord | null> {
    return this.#read(() => this.#work.getTask(id));
  }

  async listJobs(query: ListJobsQuery): ReturnType<Store['listJobs']> {
    let before = parseCursor(query.cursor);
    const items: Awaited<ReturnType<Store['listJobs']>>['items'][number][] = [];
    // Without a filter the first stretch is the page; a filter that matches little looks further each time.
    for (let span = query.limit; ; span = Math.min(LIST_SPAN, span * 4)) {
      const left = query.limit - items.length;
      const stretch = await this.#read(() => this.#work.listJobs(query, before, span, left));
      for (const { job, tasks_summary } of stretch.items) items.push({ job, tasks_summary });
      if (stretch.next === null) return { items, nextCursor: null };
      if (items.length >= query.limit) return { items, nextCursor: String(stretch.next) };
      before = stretch.next;
      // A filter that matches little looks at many jobs: let others run in between.
      await new Promise<void>((resolve) => this.#schedule(resolve));
    }
  }

  cancelJob(id: string): Promise<JobRecord | null> {
    return this.#group.run(1, () => this.#work.cancelJob(id));
  }

  deleteJob(id: string): Promise<boolean> {
    return this.#group.run(1, () => {
      const known = this.#work.deleteJob(id);
      if (known) this.#logs.delete(id);
      return known;
    });
  }

  pruneJobs({ endedForMs, artifacts, cursor }: PruneQuery): Promise<PruneAnswer> {
    const after = parseCursor(cursor) ?? 0;
    return this.#group.run(PRUNE_WEIGHT, () => {
      const { ids, next } = this.#work.pruneJobs(after, endedForMs);
      let items = 0;
      for (const id of ids) {
        this.#logs.delete(id);
        if (artifacts) items += this.#data.deleteOfJob(id);
      }
      return { jobs: ids.length, items, nextCursor: next === null ? null : String(next) };
    });
  }

  submission(jobId: string): Promise<JobSpec | null> {
    return this.#read(() => this.#work.submission(jobId));
  }

  async deadTasks(query: DeadTasksQuery): ReturnType<Store['deadTasks']> {
    let before = parseCursor(query.cursor);
    const items: TaskRecord[] = [];
    for (;;) {
      const left = query.limit - items.length;
      const stretch = await this.#read(() => this.#work.deadTasks(query, before, LIST_SPAN, left));
      items.push(...stretch.items);
      if (stretch.next === null) return { items, nextCursor: null };
      if (items.length >= query.limit) return { items, nextCursor: String(stretch.next) };
      before = stretch.next;
      await new Promise<void>((resolve) => this.#schedule(resolve));
    }
  }

  events(jobId: string, after: number, limit: number): Promise<readonly JobEvent[] | null> {
    return this.#read(() => this.#work.events(jobId, after, limit));
  }

  lease(requests: readonly LeaseRequest[]): Promise<Outcome<LeaseAnswer>[]> {
    const weight = requests.reduce((sum, request) => sum + Math.max(1, request.max), 0);
    return this.#group.run(weight, () => this.#work.lease(requests));
  }

  heartbeat(items: readonly HeartbeatItem[]): Promise<Outcome<HeartbeatAnswer>[]> {
    return this.#group.run(items.length, () => this.#work.heartbeat(items));
  }

  complete(items: readonly CompleteItem[]): Promise<Outcome<{ readonly leaseId: string }>[]> {
    return this.#group.run(items.length, () => this.#work.complete(items));
  }

  fail(items: readonly FailItem[]): Promise<Outcome<{ readonly leaseId: string }>[]> {
    return this.#group.run(items.length, () => this.#work.fail(items));
  }

  release(items: readonly ReleaseItem[]): Promise<Outcome<{ readonly leaseId: string }>[]> {
    return this.#group.run(items.length, () => this.#work.release(items));
  }

  canceledLeases(nodeId: string, leaseIds: readonly string[]): Promise<readonly string[]> {
    return this.#read(() => this.#work.canceledLeases(nodeId, leaseIds));
  }

  async sweep(): Promise<SweepAnswer> {
    let rescued = 0;
    for (;;) {
      const part = await this.#group.run(SWEEP_TASKS, () => {
        this.#nodes.expireNonces();
        return this.#work.sweep();
      });
      rescued += part.rescued;
      if (!part.more) break;
    }
    return { rescued, nextAtMs: await this.#read(() => this.#work.nextWake()) };
  }

  appendLogs(
    items: readonly LogAppend[],
    maxBytes: number,
  ): Promise<Outcome<{ readonly nextOffset: number }>[]> {
    return this.#group.run(items.length, () => this.#logs.append(items, maxBytes));
  }

  readLogs(query: LogQuery): Promise<LogPage | null> {
    return this.#read(() => this.#logs.read(query));
  }

  listLogs(jobId: string): Promise<readonly LogEntry[] | null> {
    return this.#read(() => (this.#work.knowsJob(jobId) ? this.#logs.list(jobId) : null));
  }

  standing(taskId: string): Promise<TaskStanding | null> {
    return this.#read(() => {
      const standing = this.#work.standing(taskId, true);
      if (standing === null) return null;
      const { lapsed: _, ...rest } = standing;
      return rest;
    });
  }

  putSchedule(schedule: NewSchedule): Promise<ScheduleRecord> {
    return this.#group.run(1, () => this.#schedules.put(schedule));
  }

  listSchedules(domainId: string | null): Promise<readonly ScheduleRecord[]> {
    return this.#read(() => this.#schedules.list(domainId));
  }

  getSchedule(domainId: string, name: string): Promise<ScheduleRecord | null> {
    return this.#read(() => this.#schedules.get(domainId, name));
  }

  deleteSchedule(domainId: string, name: string): Promise<boolean> {
    return this.#group.run(1, () => this.#schedules.delete(domainId, name));
  }

  async claimSchedules(claimMs: number): Promise<ClaimedSchedules> {
    const isDue = await this.#read(() => this.#schedules.isDue());
    const due = isDue ? await this.#group.run(1, () => this.#schedules.claim(claimMs)) : [];
    return { due, nextAtMs: await this.#read(() => this.#schedules.nextAt()) };
  }

  endTick(tick: EndedTick): Promise<boolean> {
    return this.#group.run(1, () => this.#schedules.end(tick));
  }

  createNode(node: NewNode): Promise<NodeRecord> {
    return this.#group.run(1, () => this.#nodes.create(node));
  }

  nodeHasSecret(nodeId: string, secretHash: string): Promise<boolean> {
    return this.#read(() => this.#nodes.hasSecret(nodeId, secretHash));
  }

  registerNode(registration: NodeRegistration): Promise<NodeRecord> {
    return this.#group.run(1, () => this.#nodes.register(registration));
  }

  getNode(id: string): Promise<NodeRecord | null> {
    return this.#read(() => this.#nodes.record(id));
  }

  findNodeByWallet(wallet: string): Promise<NodeRecord | null> {
    return this.#read(() => this.#nodes.byWallet(wallet));
  }

  async touchNode(id: string): Promise<void> {
    if (await this.#read(() => this.#nodes.wantsTouch(id)))
      await this.#group.run(1, () => this.#nodes.touch(id));
  }

  listNodes(): Promise<readonly NodeRecord[]> {
    return this.#read(() => this.#nodes.list());
  }

  busyNodes(mode: NodeMode | 'all'): Promise<readonly BusyNode[]> {
    return this.#read(() => this.#work.busyNodes(mode));
  }

  putNonce(nonce: Nonce): Promise<void> {
    return this.#group.run(1, () => this.#nodes.putNonce(nonce));
  }

  takeNonce(nonce: string): Promise<Nonce | null> {
    return this.#group.run(1, () => this.#nodes.takeNonce(nonce));
  }

  setting(name: string, create: () => JsonObject): Promise<JsonObject> {
    return this.#group.run(1, () => this.#nodes.setting(name, create));
  }

  putData(writes: readonly DataWrite[]): Promise<readonly DataRecord[]> {
    const bytes = writes.reduce((sum, write) => sum + (write.bytes?.length ?? 0), 0);
    return this.#group.run(writes.length + Math.ceil(bytes / BYTES_LIKE_A_TASK), () =>
      this.#data.put(writes),
    );
  }

  getData(domainId: string, id: string): Promise<DataRecord | null> {
    return this.#read(() => this.#data.get(domainId, id));
  }

  findData(query: DataQuery): Promise<readonly DataRecord[]> {
    return this.#read(() => this.#data.find(query));
  }

  deleteData(domainId: string, id: string): Promise<boolean> {
    return this.#group.run(1, () => this.#data.delete(domainId, id));
  }

  createUpload(upload: Omit<UploadRecord, 'parts'>): Promise<void> {
    return this.#group.run(1, () => this.#data.createUpload(upload));
  }

  getUpload(domainId: string, id: string): Promise<UploadRecord | null> {
    return this.#read(() => this.#data.getUpload(domainId, id));
  }

  putPart(
    uploadId: string,
    part: { readonly partNumber: number; readonly etag: string; readonly size: number },
  ): Promise<void> {
    return this.#group.run(1, () => this.#data.putPart(uploadId, part));
  }

  deleteUpload(id: string): Promise<boolean> {
    return this.#group.run(1, () => this.#data.deleteUpload(id));
  }

  expiredUploads(limit: number): Promise<readonly UploadRecord[]> {
    return this.#read(() => this.#data.expiredUploads(limit));
  }

  unreferencedDigests(digests: readonly string[]): Promise<readonly string[]> {
    return this.#read(() => this.#data.unreferenced(digests));
  }

  putCompute(compute: ComputeWrite): Promise<PutComputeAnswer> {
    return this.#group.run(1, () => this.#computes.put(compute));
  }

  getCompute(digest: string): Promise<ComputeRecord | null> {
    return this.#read(() => this.#computes.get(digest));
  }

  async listComputes(query: ListComputesQuery): ReturnType<Store['listComputes']> {
    const before = parseCursor(query.cursor);
    const { items, next } = await this.#read(() => this.#computes.list(query, before));
    return { items, nextCursor: next === null ? null : String(next) };
  }

  deleteCompute(digest: string): Promise<boolean> {
    return this.#group.run(1, () => this.#computes.delete(digest));
  }

  missingComputes(digests: readonly string[]): Promise<readonly string[]> {
    return this.#read(() => this.#computes.missing(digests));
  }

  queues(): Promise<readonly QueueStanding[]> {
    return this.#read(() => this.#work.queues());
  }

  setWeight(domainId: string, weight: number): Promise<void> {
    return this.#group.run(1, () => this.#work.setWeight(domainId, weight));
  }

  domains(): Promise<readonly DomainStanding[]> {
    return this.#read(() => this.#work.domains());
  }

  stats(): Promise<StoreStats> {
    return this.#read(() => this.#work.stats());
  }

  subscribe(listener: (change: StoreChange) => void): Disposable {
    // A wrapper per subscription: the same function may be subscribed twice.
    const entry = (change: StoreChange): void => listener(change);
    this.#listeners.add(entry);
    return { [Symbol.dispose]: () => void this.#listeners.delete(entry) };
  }

  standBy(standby: Standby): Disposable {
    this.#standbys.add(standby);
    return { [Symbol.dispose]: () => void this.#standbys.delete(standby) };
  }

  [Symbol.asyncDispose](): Promise<void> {
    return (this.#closing ??= this.#group.close().then(() => {
      this.#open = false;
      this.#listeners.clear();
      this.#standbys.clear();
      this.#database.close();
    }));
  }

  #read<T>(work: () => T): Promise<T> {
    return new Promise((resolve) => {
      if (!this.#open) throw closedError();
      this.#refresh();
      resolve(work());
    });
  }

  #refresh(): void {
    if (!this.#stale) return;
    this.#work.load();
    this.#nodes.load();
    this.#stale = false;
  }

  #transaction(): Transaction {
    const database = this.#database;
    return {
      begin: () => {
        this.#refresh();
        database.exec('BEGIN IMMEDIATE');
      },
      extend: () => {
        if (!this.#work.madeRunnable) return;
        for (const standby of this.#standbys) {
          const requests = standby.requests();
          if (requests.length > 0) this.#grants.push({ standby, outcomes: this.#work.lease(requests) });
        }
      },
      commit: () => {
        this.#work.flush();
        database.exec('COMMIT');
      },
      rollback: () => {
        // Read again at the next use: the disk may just have failed.
        this.#stale = true;
        this.#grants = [];
        this.#logs.takeGrown();
        database.rollback();
      },
      get writes() {
        return database.writes;
      },
      storageError: (error) => database.storageError(error),
      committed: () => {
        const grants = this.#grants;
        this.#grants = [];
        for (const { standby, outcomes } of grants) {
          this.#call('granted', () => standby.granted(outcomes));
        }
        const changes = this.#work.takeChanges();
        const taskIds = this.#logs.takeGrown();
        if (taskIds.length > 0) changes.push({ kind: 'logs', taskIds });
        for (const change of changes) {
          for (const listener of this.#listeners) this.#call(change.kind, () => listener(change));
        }
      },
    };
  }

  #call(kind: string, listener: () => void): void {
    try {
      listener();
    } catch (error) {
      // The change is committed; a listener that cannot cope must not make it look otherwise.
      this.#log?.error('store listener failed', { kind, error: String(error) });
    }
  }
}
