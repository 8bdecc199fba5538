/**
 * The store for many dispatchers: PostgreSQL. Any number of processes share one database and keep nothing of their own that
 * could differ from it; the database's clock judges leases. docs/postgres.md tells how to run it.
 *
 * Calls are grouped into transactions (`lane.ts`): submissions, leases, what is said under leases, and logs each have a lane,
 * and within a lane calls run in the order of asking. The rules are in `lifecycle.ts`, their rows in `postgres-unit.ts`,
 * where it also stands in which order rows are locked.
 */
import { systemClock } from '@millrace/runner';
import type { Clock, JsonObject, Logger, Random } from '@millrace/runner';
import { MillraceError } from '@millrace/runner';
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
  Store,
  StoreChange,
  StoreStats,
  SweepAnswer,
  TaskStanding,
  UploadRecord,
} from '../store.ts';
import { parseCursor, parsePairCursor } from './cursors.ts';
import { closedError } from './group-commit.ts';
import { uuidV7 } from './ids.ts';
import { Lane } from './lane.ts';
import type { Call } from './lane.ts';
import { Bell } from './postgres-bell.ts';
import { Data } from './postgres-data.ts';
import { Database, MIN_CONNECTIONS, TOTAL_COLUMNS, parseAddress, sql } from './postgres-database.ts';
import type { Address } from './postgres-database.ts';
import { cancelJob, deleteJob, pruneJobs, submitJobs } from './postgres-jobs.ts';
import type { Answers } from './postgres-jobs.ts';
import { mendLeases, nextWake, resumeLeases, sweepTasks, takeReports } from './postgres-leases.ts';
import type { Report } from './postgres-leases.ts';
import { Leasing } from './postgres-leasing.ts';
import { showStuck } from './postgres-limits.ts';
import { appendLogs, listLogs, readLogs } from './postgres-logs.ts';
import type { AppendCall } from './postgres-logs.ts';
import { prepareDatabase } from './postgres-migrate.ts';
import { Names } from './postgres-names.ts';
import { Nodes } from './postgres-nodes.ts';
import { Queues } from './postgres-queues.ts';
import { Reads } from './postgres-reads.ts';
import { Schedules } from './postgres-schedules.ts';
import type { WorkSettings } from './postgres-unit.ts';

export interface PostgresStoreOptions {
  /**
   * `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…`. What is left out is taken from libpq's environment variables
   * (`PGUSER`, `PGPASSWORD`, …) and `~/.pgpass`. Must lead to the server itself, not to a pooler.
   */
  readonly url: string;
  /** Connections of this store at most: five do the work, the rest answer questions. At least 6. Default 10. */
  readonly connections?: number;
  /** How long a call waits for a database that went away before it is refused as `unavailable`. Default 10,000 ms. */
  readonly patienceMs?: number;
  /** Takes the place of the database's clock, for tests and simulations. */
  readonly clock?: Clock;
  /** Default: `Math.random`. Ids and backoff come from it; neither is a secret. */
  readonly random?: Random;
  /** How long a lease lives without a heartbeat. Default 15,000 ms. */
  readonly leaseTtlMs?: number;
  /** How long heartbeats keep a cancelled lease alive after the request. Default 60,000 ms. */
  readonly cancelGraceMs?: number;
  /** Between the attempts of a task. Default: up to 1 s after the first, doubling, at most 60 s. */
  readonly backoff?: Backoff;
  readonly log?: Logger;
}

/**
 * Connects, makes or updates the tables in the schema `millrace`, and listens to other dispatchers.
 *
 * @throws MillraceError `invalid_argument` for a wrong URL or option; `unavailable` when the server cannot be reached;
 * `unauthenticated` and `permission_denied` as the server says; `failed_precondition` when the database does not exist, is
 * a standby, not UTF-8, older than PostgreSQL 13, or written by a newer Millrace. Messages never hold the password.
 */
export async function openPostgresStore(options: PostgresStoreOptions): Promise<Store> {
  const { connections = DEFAULT_CONNECTIONS } = options;
  if (!Number.isSafeInteger(connections) || connections < MIN_CONNECTIONS) {
    throw new MillraceError(
      'invalid_argument',
      `connections must be an integer of at least ${MIN_CONNECTIONS}, got ${connections}`,
    );
  }
  const address = await prepareDatabase(parseAddress(options.url), options.log);
  const store = new PostgresStore(options, address, connections);
  try {
    await store.listen();
  } catch (error) {
    await store[Symbol.asyncDispose]();
    throw error;
  }
  return store;
}

const DEFAULT_CONNECTIONS = 10;
const DEFAULT_PATIENCE_MS = 10_000;

/** What the sweep does besides leases, and how often. */
const HOUSEKEEPING_MS = 10_000;

/** Writers that were not heard of for a day are gone; what they counted is kept in one row. */
const FOLD_WRITERS = sql(`
  WITH gone AS (
    DELETE FROM writers WHERE id <> 'folded' AND at < millis($1) - 86400000 RETURNING *)
  INSERT INTO writers AS w (id, serial, at, ${TOTAL_COLUMNS.join(', ')})
  SELECT 'folded', 0, 0, ${TOTAL_COLUMNS.map((column) => `sum(${column})`).join(', ')} FROM gone HAVING count(*) > 0
  ON CONFLICT (id) DO UPDATE SET ${TOTAL_COLUMNS.map((column) => `${column} = w.${column} + excluded.${column}`).join(', ')}`);

type SubmitCall = Call & { readonly jobs: readonly NewJob[] };
type LeaseCall = Call & { readonly requests: readonly LeaseRequest[] };
type ChangeCall = Call &
  (
    | { readonly kind: 'report'; readonly report: Report }
    | { readonly kind: 'cancel' | 'delete'; readonly jobId: string }
    | { readonly kind: 'prune'; readonly query: PruneQuery; readonly after: number }
    | { readonly kind: 'sweep' }
  );
type SettingCall = Call & { readonly name: string; readonly create: () => JsonObject };

class PostgresStore implements Store {
  readonly #database: Database;
  readonly #settings: WorkSettings;
  readonly #leasing: Leasing;
  readonly #reads: Reads;
  readonly #nodes: Nodes;
  readonly #data: Data;
  readonly #schedules: Schedules;
  readonly #bell: Bell;
  readonly #log: Logger | undefined;
  readonly #submits = new Lane<SubmitCall>((calls) => this.#runSubmits(calls));
  readonly #leases = new Lane<LeaseCall>((calls) => this.#runLeases(calls));
  readonly #changes = new Lane<ChangeCall>((calls) => this.#runChanges(calls));
  readonly #logs = new Lane<Call & AppendCall>((calls) => this.#runLogs(calls));
  /** Settings are made in the order of asking, so that all callers of one process get the first one's. */
  readonly #making = new Lane<SettingCall>((calls) => this.#runSettings(calls));
  readonly #listeners = new Set<(change: StoreChange) => void>();
  readonly #underWay = new Set<Promise<unknown>>();
  #housekeptAt = -Infinity;
  /** The store's time at the last sweep; before the first, later than any. */
  #sweptAt = Infinity;
  #open = true;
  #closing: Promise<void> | null = null;

  constructor(options: PostgresStoreOptions, address: Address, connections: number) {
    const { log } = options;
    const newId = uuidV7(options.clock ?? systemClock, options.random ?? Math.random);
    this.#log = log;
    this.#database = new Database({
      address,
      connections,
      patienceMs: options.patienceMs ?? DEFAULT_PATIENCE_MS,
      clock: options.clock ?? null,
      log,
    });
    const queues = new Queues(this.#database);
    const names = new Names(this.#database);
    this.#settings = {
      random: options.random ?? Math.random,
      newId,
      leaseTtlMs: options.leaseTtlMs ?? 15_000,
      cancelGraceMs: options.cancelGraceMs ?? 60_000,
      backoff: options.backoff ?? DEFAULT_BACKOFF,
      queues,
      names,
    };
    this.#leasing = new Leasing(this.#database, this.#settings);
    this.#reads = new Reads(this.#database, queues, names);
    this.#nodes = new Nodes(this.#database, queues, newId);
    this.#data = new Data(this.#database, names, newId);
    this.#schedules = new Schedules(this.#database, newId);
    this.#bell = new Bell({
      database: this.#database,
      address,
      log,
      onChange: (change) => this.#tell(change),
    });
  }

  /** Hears other dispatchers from now on. */
  async listen(): Promise<void> {
    await this.#bell.open();
  }

  submit(jobs: readonly NewJob[]): Promise<Outcome<{ readonly jobId: string; readonly created: boolean }>[]> {
    const weight = jobs.reduce((sum, job) => sum + job.spec.tasks.length, 0);
    return this.#submits.ask({ kind: 'submit', weight, jobs });
  }

  getJob(id: string): Promise<JobDetail | null> {
    return this.#during(() => this.#reads.job(id));
  }

  getTask(id: string): Promise<TaskRecord | null> {
    return this.#during(() => this.#reads.task(id));
  }

  listJobs(query: ListJobsQuery): ReturnType<Store['listJobs']> {
    return this.#during(async () => {
      const { items, next } = await this.#reads.list(query, parseCursor(query.cursor));
      return { items, nextCursor: next === null ? null : String(next) };
    });
  }

  cancelJob(id: string): Promise<JobRecord | null> {
    return this.#changes.ask({ kind: 'cancel', weight: 1, jobId: id });
  }

  deleteJob(id: string): Promise<boolean> {
    return this.#changes.ask({ kind: 'delete', weight: 1, jobId: id });
  }

  async pruneJobs(query: PruneQuery): Promise<PruneAnswer> {
    const after = parseCursor(query.cursor) ?? 0;
    const { next, ...removed } = await this.#changes.ask<
      Omit<PruneAnswer, 'nextCursor'> & { next: number | null }
    >({
      kind: 'prune',
      weight: 1,
      query,
      after,
    });
    return { ...removed, nextCursor: next === null ? null : String(next) };
  }

  submission(jobId: string): Promise<JobSpec | null> {
    return this.#during(() => this.#reads.submission(jobId));
  }

  deadTasks(query: DeadTasksQuery): ReturnType<Store['deadTasks']> {
    return this.#during(async () => {
      const { items, next } = await this.#reads.deadTasks(query, parsePairCursor(query.cursor));
      return { items, nextCursor: next === null ? null : next.join('-') };
    });
  }

  events(jobId: string, after: number, limit: number): Promise<readonly JobEvent[] | null> {
    return this.#during(() => this.#reads.events(jobId, after, limit));
  }

  lease(requests: readonly LeaseRequest[]): Promise<Outcome<LeaseAnswer>[]> {
    const weight = requests.reduce((sum, { max }) => sum + Math.max(1, max), 0);
    return this.#leases.ask({ kind: 'lease', weight, requests });
  }

  heartbeat(items: readonly HeartbeatItem[]): Promise<Outcome<HeartbeatAnswer>[]> {
    return this.#report({ verb: 'heartbeat', items });
  }

  complete(items: readonly CompleteItem[]): Promise<Outcome<{ readonly leaseId: string }>[]> {
    return this.#report({ verb: 'complete', items });
  }

  fail(items: readonly FailItem[]): Promise<Outcome<{ readonly leaseId: string }>[]> {
    return this.#report({ verb: 'fail', items });
  }

  release(items: readonly ReleaseItem[]): Promise<Outcome<{ readonly leaseId: string }>[]> {
    return this.#report({ verb: 'release', items });
  }

  canceledLeases(nodeId: string, leaseIds: readonly string[]): Promise<readonly string[]> {
    return this.#during(() => this.#reads.canceledLeases(nodeId, leaseIds));
  }

  async sweep(): Promise<SweepAnswer> {
    let rescued = 0;
    for (;;) {
      const part = await this.#changes.ask<{ rescued: number; more: boolean }>({ kind: 'sweep', weight: 1 });
      rescued += part.rescued;
      if (!part.more) break;
    }
    return await this.#during(async () => {
      await this.#housekeep();
      const next = await nextWake(this.#database);
      const setBack = next.now < this.#sweptAt;
      this.#sweptAt = next.now;
      if (!setBack) return { rescued, nextAtMs: next.nextAtMs };
      await mendLeases(this.#database);
      const { nextAtMs } = await nextWake(this.#database);
      return { rescued, nextAtMs };
    });
  }

  appendLogs(
    items: readonly LogAppend[],
    maxBytes: number,
  ): Promise<Outcome<{ readonly nextOffset: number }>[]> {
    return this.#logs.ask({ kind: 'append', weight: items.length, items, maxBytes });
  }

  readLogs(query: LogQuery): Promise<LogPage | null> {
    return this.#during(() => readLogs(this.#database, this.#settings.names, query));
  }

  listLogs(jobId: string): Promise<readonly LogEntry[] | null> {
    return this.#during(() => listLogs(this.#database, jobId));
  }

  standing(taskId: string): Promise<TaskStanding | null> {
    return this.#during(() => this.#reads.standing(taskId));
  }

  putSchedule(schedule: NewSchedule): Promise<ScheduleRecord> {
    return this.#during(() => this.#schedules.put(schedule));
  }

  listSchedules(domainId: string | null): Promise<readonly ScheduleRecord[]> {
    return this.#during(() => this.#schedules.list(domainId));
  }

  getSchedule(domainId: string, name: string): Promise<ScheduleRecord | null> {
    return this.#during(() => this.#schedules.get(domainId, name));
  }

  deleteSchedule(domainId: string, name: string): Promise<boolean> {
    return this.#during(() => this.#schedules.delete(domainId, name));
  }

  claimSchedules(claimMs: number): Promise<ClaimedSchedules> {
    return this.#during(() => this.#schedules.claim(claimMs));
  }

  endTick(tick: EndedTick): Promise<boolean> {
    return this.#during(() => this.#schedules.end(tick));
  }

  createNode(node: NewNode): Promise<NodeRecord> {
    return this.#during(() => this.#nodes.create(node));
  }

  nodeHasSecret(nodeId: string, secretHash: string): Promise<boolean> {
    return this.#during(() => this.#nodes.hasSecret(nodeId, secretHash));
  }

  registerNode(registration: NodeRegistration): Promise<NodeRecord> {
    return this.#during(() => this.#nodes.register(registration));
  }

  getNode(id: string): Promise<NodeRecord | null> {
    return this.#during(() => this.#nodes.get(id));
  }

  findNodeByWallet(wallet: string): Promise<NodeRecord | null> {
    return this.#during(() => this.#nodes.byWallet(wallet));
  }

  touchNode(id: string): Promise<void> {
    return this.#during(() => this.#nodes.touch(id));
  }

  listNodes(): Promise<readonly NodeRecord[]> {
    return this.#during(() => this.#nodes.list());
  }

  busyNodes(mode: NodeMode | 'all'): Promise<readonly BusyNode[]> {
    return this.#during(() => this.#reads.busyNodes(mode));
  }

  putNonce(nonce: Nonce): Promise<void> {
    return this.#during(() => this.#nodes.putNonce(nonce));
  }

  takeNonce(nonce: string): Promise<Nonce | null> {
    return this.#during(() => this.#nodes.takeNonce(nonce));
  }

  setting(name: string, create: () => JsonObject): Promise<JsonObject> {
    return this.#making.ask({ kind: 'setting', weight: 1, name, create });
  }

  putData(writes: readonly DataWrite[]): Promise<readonly DataRecord[]> {
    const leases = writes.flatMap(({ lease, domainId }) => (lease ? [{ ref: lease, domainId }] : []));
    return this.#during(() => this.#underLeases(leases, () => this.#data.put(writes)));
  }

  getData(domainId: string, id: string): Promise<DataRecord | null> {
    return this.#during(() => this.#data.get(domainId, id));
  }

  findData(query: DataQuery): Promise<readonly DataRecord[]> {
    return this.#during(() => this.#data.find(query));
  }

  deleteData(domainId: string, id: string): Promise<boolean> {
    return this.#during(() => this.#data.delete(domainId, id));
  }

  createUpload(upload: Omit<UploadRecord, 'parts'>): Promise<void> {
    const { lease, domainId } = upload;
    const leases = lease ? [{ ref: lease, domainId }] : [];
    return this.#during(() => this.#underLeases(leases, () => this.#data.createUpload(upload)));
  }

  getUpload(domainId: string, id: string): Promise<UploadRecord | null> {
    return this.#during(() => this.#data.getUpload(domainId, id));
  }

  putPart(
    uploadId: string,
    part: { readonly partNumber: number; readonly etag: string; readonly size: number },
  ): Promise<void> {
    return this.#during(() => this.#data.putPart(uploadId, part));
  }

  deleteUpload(id: string): Promise<boolean> {
    return this.#during(() => this.#data.deleteUpload(id));
  }

  expiredUploads(limit: number): Promise<readonly UploadRecord[]> {
    return this.#during(() => this.#data.expiredUploads(limit));
  }

  unreferencedDigests(digests: readonly string[]): Promise<readonly string[]> {
    return this.#during(() => this.#data.unreferenced(digests));
  }

  putCompute(compute: ComputeWrite): Promise<PutComputeAnswer> {
    return this.#during(() => this.#data.putCompute(compute));
  }

  getCompute(digest: string): Promise<ComputeRecord | null> {
    return this.#during(() => this.#data.getCompute(digest));
  }

  listComputes(query: ListComputesQuery): ReturnType<Store['listComputes']> {
    return this.#during(async () => {
      const { items, next } = await this.#data.listComputes(query, parseCursor(query.cursor));
      return { items, nextCursor: next === null ? null : String(next) };
    });
  }

  deleteCompute(digest: string): Promise<boolean> {
    return this.#during(() => this.#data.deleteCompute(digest));
  }

  missingComputes(digests: readonly string[]): Promise<readonly string[]> {
    return this.#during(() => this.#data.missingComputes(digests));
  }

  queues(): Promise<readonly QueueStanding[]> {
    return this.#during(() => this.#reads.queues());
  }

  setWeight(domainId: string, weight: number): Promise<void> {
    return this.#during(() => this.#reads.setWeight(domainId, weight));
  }

  domains(): Promise<readonly DomainStanding[]> {
    return this.#during(() => this.#reads.domains());
  }

  stats(): Promise<StoreStats> {
    return this.#during(() => this.#reads.stats());
  }

  subscribe(listener: (change: StoreChange) => void): Disposable {
    // A wrapper per subscription: the same function may be subscribed twice.
    const entry = (change: StoreChange): void => listener(change);
    this.#listeners.add(entry);
    return { [Symbol.dispose]: () => void this.#listeners.delete(entry) };
  }

  standBy(): Disposable {
    // A commit here is no synchronous step: whoever waits for work asks when it hears of the change.
    return { [Symbol.dispose]: () => {} };
  }

  [Symbol.asyncDispose](): Promise<void> {
    return (this.#closing ??= this.#close());
  }

  async #close(): Promise<void> {
    this.#open = false;
    await Promise.all(
      [this.#submits, this.#leases, this.#changes, this.#logs, this.#making].map((lane) => lane.close()),
    );
    while (this.#underWay.size > 0) await Promise.allSettled(this.#underWay);
    await this.#bell.close();
    this.#listeners.clear();
    await this.#database.close();
  }

  #report<T>(report: Report): Promise<T> {
    return this.#changes.ask({ kind: 'report', weight: report.items.length, report });
  }

  /** Writes; and again, when it was refused because of leases that had expired and could be resumed. */
  async #underLeases<T>(leases: LeasesOfWrites, write: () => Promise<T>): Promise<T> {
    try {
      return await write();
    } catch (error) {
      const refused = MillraceError.is(error) && error.code === 'aborted' && leases.length > 0;
      if (!refused || !(await this.#resumed(leases))) throw error;
      return await write();
    }
  }

  /** True: some of these leases had expired, and are held again. */
  async #resumed(leases: LeasesOfWrites): Promise<boolean> {
    const { value, changes } = await resumeLeases(this.#database, this.#settings, leases);
    this.#announce(changes);
    return value > 0;
  }

  /** What runs beside the lanes: closing waits for it, and it is refused once closed. */
  async #during<T>(work: () => Promise<T>): Promise<T> {
    if (!this.#open) throw closedError();
    const running = work();
    this.#underWay.add(running);
    try {
      return await running;
    } finally {
      this.#underWay.delete(running);
    }
  }

  async #runSubmits(calls: readonly SubmitCall[]): Promise<Outcome<unknown>[]> {
    const answers = await submitJobs(
      this.#database,
      this.#settings,
      calls.flatMap(({ jobs }) => jobs),
    );
    return this.#share(
      answers,
      calls.map(({ jobs }) => jobs.length),
    );
  }

  async #runLeases(calls: readonly LeaseCall[]): Promise<Outcome<unknown>[]> {
    const requests = calls.flatMap((call) => call.requests);
    const answers = await this.#leasing.lease(requests);
    return this.#share(
      answers,
      calls.map((call) => call.requests.length),
    );
  }

  async #runLogs(calls: readonly (Call & AppendCall)[]): Promise<Outcome<unknown>[]> {
    const append = async (): Promise<Outcome<{ readonly nextOffset: number }>[][]> => {
      const { outcomes, changes } = await appendLogs(this.#database, this.#settings.names, calls);
      this.#announce(changes);
      return outcomes;
    };
    let outcomes = await append();
    const refused = calls.flatMap(({ items }, call) =>
      items.filter((_, index) => isAborted(outcomes[call]?.[index])).map((ref) => ({ ref, domainId: null })),
    );
    // What is there already is not appended again.
    if (refused.length > 0 && (await this.#resumed(refused))) outcomes = await append();
    return outcomes.map((value) => ({ ok: true, value }));
  }

  async #runChanges(calls: readonly ChangeCall[]): Promise<Outcome<unknown>[]> {
    const reports = calls.flatMap((call) => (call.kind === 'report' ? [call.report] : []));
    if (reports.length > 0) {
      const { outcomes, changes } = await takeReports(this.#database, this.#settings, reports);
      this.#announce(changes);
      return outcomes.map((value) => ({ ok: true, value }));
    }
    const answers: Outcome<unknown>[] = [];
    for (const call of calls) answers.push(await outcomeOf(this.#runChange(call)));
    return answers;
  }

  async #runChange(call: ChangeCall): Promise<unknown> {
    if (call.kind === 'cancel') {
      const { value, changes } = await cancelJob(this.#database, this.#settings, call.jobId);
      this.#announce(changes);
      return value;
    }
    if (call.kind === 'delete') {
      const { value, changes } = await deleteJob(this.#database, this.#settings, call.jobId);
      this.#announce(changes);
      return value ?? false;
    }
    if (call.kind === 'prune') {
      const { value, changes } = await pruneJobs(this.#database, this.#settings, call.query, call.after);
      this.#announce(changes);
      return value;
    }
    const { value, changes } = await sweepTasks(this.#database, this.#settings);
    this.#announce(changes);
    return value;
  }

  async #runSettings(calls: readonly SettingCall[]): Promise<Outcome<unknown>[]> {
    const answers: Outcome<unknown>[] = [];
    for (const { name, create } of calls) answers.push(await outcomeOf(this.#nodes.setting(name, create)));
    return answers;
  }

  /** Each call's part of the outcomes of all. */
  #share<T>({ outcomes, changes }: Answers<T>, counts: readonly number[]): Outcome<unknown>[] {
    this.#announce(changes);
    let at = 0;
    return counts.map((count) => {
      at += count;
      return { ok: true, value: outcomes.slice(at - count, at) };
    });
  }

  /** Tells this store's listeners and the other dispatchers'. */
  #announce(changes: readonly StoreChange[]): void {
    this.#bell.ring(changes);
    for (const change of changes) this.#tell(change);
  }

  #tell(change: StoreChange): void {
    for (const listener of this.#listeners) {
      try {
        listener(change);
      } catch (error) {
        // The change is committed; a listener that cannot cope must not make it look otherwise.
        this.#log?.error('store listener failed', { kind: change.kind, error: String(error) });
      }
    }
  }

  async #housekeep(): Promise<void> {
    const now = systemClock.monotonic();
    if (now - this.#housekeptAt < HOUSEKEEPING_MS) return;
    this.#housekeptAt = now;
    await this.#nodes.expireNonces();
    await this.#database.transaction('call', (transaction) =>
      transaction.count(FOLD_WRITERS, [transaction.given]),
    );
    const shown = await this.#database.transaction('call', (transaction) => showStuck(transaction));
    if (shown) this.#announce([{ kind: 'runnable' }]);
  }
}

type LeasesOfWrites = Parameters<typeof resumeLeases>[2];

function isAborted(outcome: Outcome<unknown> | undefined): boolean {
  return outcome?.ok === false && outcome.error.code === 'aborted';
}

async function outcomeOf(running: Promise<unknown>): Promise<Outcome<unknown>> {
  try {
    return { ok: true, value: await running };
  } catch (error) {
    // Not ours to judge: an error of the caller's own function reaches the caller as it is.
    return { ok: false, error: error as MillraceError };
  }
}
