/** The requestor's side: submit jobs, watch them, fetch artifacts, make node credentials. */
import type { ByteStream, JsonObject } from '@millrace/runner';
import type {
  BusyNode,
  ConcurrencyLimit,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobRecord,
  JobStatus,
  NodeMode,
  NodeRecord,
  ScheduleRecord,
  TaskRecord,
  TasksSummary,
  CapabilityFilters,
} from '../records.ts';
import type { Computes } from './computes.ts';
import type { JobExplanation, TaskExplanation } from '../explain.ts';
import type { QueueReport } from '../queue-report.ts';
import type { CallOptions } from './dms.ts';
import type { DomainStorage, NewItem } from './domain.ts';
import type { UploadOptions } from './upload.ts';

/** A job file: the posemesh job spec with everything optional that has a default. */
export interface JobSubmission {
  readonly label?: string;
  /** Default: the token's domain, else the dispatcher's default domain. */
  readonly domain_id?: string;
  readonly priority?: number;
  readonly meta?: JsonObject;
  readonly deadline_at?: string;
  /** RFC 3339: no task is given out before. */
  readonly not_before?: string;
  /** Of its tasks that have none of their own. */
  readonly concurrency?: ConcurrencyLimit;
  readonly tasks: readonly TaskDraft[];
  readonly edges?: readonly { readonly from: string; readonly to: string }[];
  /** Tasks that declare themselves deterministic may be completed from an earlier result. Default false. */
  readonly cache?: boolean;
}

export interface TaskDraft {
  readonly label?: string;
  readonly stage?: string;
  readonly capability: string;
  readonly capability_filters?: CapabilityFilters;
  readonly priority?: number;
  readonly inputs_cids?: readonly string[];
  readonly outputs_prefix?: string;
  readonly mode?: NodeMode;
  readonly meta?: unknown;
  readonly max_attempts?: number;
  readonly deadline_at?: string;
  /** RFC 3339: not given out before, nor before the job's. */
  readonly not_before?: string;
  /** Only while fewer than `limit` tasks with the same key, of any job of the domain, are leased or running. */
  readonly concurrency?: ConcurrencyLimit;
  /**
   * What it takes of a node that says what it has: `cpu` in cores, `memory` in bytes or as a size such as `"512MiB"`, whole
   * `gpu`, or names of one's own. Default: one `cpu`.
   */
  readonly resources?: Readonly<Record<string, number | string>>;
}

export interface ScheduleDraft {
  /** 1 to 128 letters, digits, dots, underscores and hyphens; unique in the job's domain. */
  readonly name: string;
  /** Minute, hour, day of month, month, day of week. */
  readonly cron: string;
  /** Of the IANA database. Default UTC. */
  readonly time_zone?: string;
  /** Whether the last of the ticks that nobody was there for is made up for. Default `skip`. */
  readonly catch_up?: ScheduleRecord['catch_up'];
  /** Whether a tick submits its job while the job before has not ended. Default `allow`. */
  readonly overlap?: ScheduleRecord['overlap'];
  /** One of the same name goes. Default false. */
  readonly replace?: boolean;
  /** Without `deadline_at` and `not_before`. Its `meta` gets `schedule`: name and tick. */
  readonly job: JobSubmission;
}

export type ListedSchedule = Omit<ScheduleRecord, 'job'> & {
  /** The job's. */
  readonly label: string;
  readonly tasks: number;
};

export interface JobsPage {
  readonly items: readonly { readonly job: JobRecord; readonly tasks_summary: TasksSummary }[];
  readonly next_cursor: string | null;
}

export interface TaskLogPage {
  readonly jobId: string;
  readonly attempt: number;
  /** Attempts begun so far. */
  readonly attempts: number;
  /** Of the first byte of `bytes`. */
  readonly offset: number;
  readonly nextOffset: number;
  readonly bytes: Uint8Array;
  /** Bytes the log has now. */
  readonly size: number;
  /** Nothing will be added to it. */
  readonly ended: boolean;
  /** There will be no attempt after {@link attempts}. */
  readonly taskEnded: boolean;
}

export interface SubmitOptions extends CallOptions {
  readonly idempotencyKey?: string;
  /** W3C `traceparent`: the trace that the job becomes a part of. Default: the dispatcher begins one if it traces. */
  readonly traceparent?: string;
}

export interface Requestor {
  submit(job: JobSubmission, options?: SubmitOptions): Promise<string>;
  jobs(
    query?: {
      readonly domainId?: string;
      readonly status?: JobStatus;
      readonly capabilities?: readonly string[];
      readonly limit?: number;
      readonly cursor?: string;
    },
    options?: CallOptions,
  ): Promise<JobsPage>;
  job(id: string, options?: CallOptions): Promise<JobDetail>;
  cancel(
    id: string,
    options?: CallOptions,
  ): Promise<{ readonly id: string; readonly status: JobStatus; readonly updated_at: string }>;
  delete(id: string, options?: CallOptions): Promise<void>;
  /**
   * Submits a new job of the tasks that a failed or canceled job left undone; what completed stays done. The same job again gives
   * the same answer with `created: false`, unless `idempotencyKey` is one that was not used for it before.
   *
   * @throws MillraceError `failed_precondition` when the job has not ended or completed
   */
  redrive(
    id: string,
    options?: CallOptions & { readonly idempotencyKey?: string },
  ): Promise<{
    readonly job_id: string;
    readonly redrive_of: string;
    readonly tasks: number;
    readonly created: boolean;
  }>;
  /** Tasks that failed for good, those of the newest job first. */
  deadTasks(
    query?: {
      readonly domainId?: string;
      readonly jobId?: string;
      readonly capability?: string;
      /** 1 to 100. Default 50. */
      readonly limit?: number;
      readonly cursor?: string;
    },
    options?: CallOptions,
  ): Promise<{ readonly items: readonly TaskRecord[]; readonly next_cursor: string | null }>;
  /**
   * Every event of a job after `after` (default 0), past ones first, then live ones, ending with the job's terminal
   * event. Reconnects by sequence number when the connection breaks, so there is no gap and no repeat. With
   * `follow: false` it ends after the events there are now.
   */
  events(
    id: string,
    options?: CallOptions & { readonly after?: number; readonly follow?: boolean },
  ): AsyncIterable<JobEvent>;
  /**
   * A page of what one attempt of a task said: whole lines of NDJSON, UTF-8. With `waitSecs` it waits for the first line after
   * `offset`, or the end of the log, at most as long as the dispatcher lets wait. `attempt` counts from 1; default: the
   * newest. Asking for the one after the newest waits for that to begin. `offset`: default 0; below 0 from the end, then
   * beginning with a whole line.
   */
  taskLog(
    taskId: string,
    query?: {
      readonly attempt?: number;
      readonly offset?: number;
      /** Bytes at most. Default 256 KiB, at most 1 MiB. */
      readonly limit?: number;
      readonly waitSecs?: number;
    },
    options?: CallOptions,
  ): Promise<TaskLogPage>;
  /** The attempts of a job's tasks that have a log. */
  jobLogs(
    jobId: string,
    options?: CallOptions,
  ): Promise<readonly { readonly task_id: string; readonly attempt: number; readonly size: number }[]>;
  /** Why a task stands where it does. */
  explainTask(taskId: string, options?: CallOptions): Promise<TaskExplanation>;
  /** Why the tasks of a job stand where they do, by what they have in common. */
  explainJob(jobId: string, options?: CallOptions): Promise<JobExplanation>;
  /** Submits a job at set times from now on. @throws MillraceError `invalid_argument`, `already_exists` without `replace` */
  addSchedule(schedule: ScheduleDraft, options?: CallOptions): Promise<ScheduleRecord>;
  /** By domain and name. */
  schedules(options?: CallOptions): Promise<readonly ListedSchedule[]>;
  /** `domainId`: default the token's, else the dispatcher's. @throws MillraceError `not_found` */
  schedule(name: string, options?: CallOptions & { readonly domainId?: string }): Promise<ScheduleRecord>;
  /** Jobs it has submitted go on. @throws MillraceError `not_found` */
  removeSchedule(name: string, options?: CallOptions & { readonly domainId?: string }): Promise<void>;
  nodes(options?: CallOptions): Promise<readonly NodeRecord[]>;
  /** The domains that have a weight of their own, or tasks that are ready or held, by id; with a token for one domain, that one. */
  domains(options?: CallOptions): Promise<readonly DomainStanding[]>;
  /**
   * Tasks a domain is given for each one of a domain of weight 1, while both have some that wait: a whole number from 1 to 1000.
   *
   * @throws MillraceError `permission_denied` with a token for one domain
   */
  setWeight(domainId: string, weight: number, options?: CallOptions): Promise<void>;
  /** How much work waits, by what it demands of a node, and who could do it. */
  queues(options?: CallOptions): Promise<QueueReport>;
  busyNodes(options?: CallOptions): Promise<readonly BusyNode[]>;
  /** Makes credentials for a node. `registrationCredentials` is the value for `REG_SECRET`. */
  addNode(
    node: { readonly name: string; readonly mode: NodeMode },
    options?: CallOptions,
  ): Promise<{
    readonly id: string;
    readonly registrationSecret: string;
    readonly registrationCredentials: string;
  }>;
  /** Throws `unavailable` when the dispatcher does not answer. */
  health(options?: CallOptions): Promise<{ readonly version: string; readonly domainId: string }>;
  /**
   * Sends bytes, or a stream of any length, as a new data item of `domainId` (default: the dispatcher's own domain) and resolves with its
   * id, for `inputs_cids`. What may succeed is tried again; memory holds a few parts at most. A function is called for each time they are
   * read: with their `size` and `sha256` they go past the dispatcher where that is offered.
   *
   * @throws MillraceError `failed_precondition` when the bytes are not those of `sha256`; `already_exists` for a taken name
   */
  upload(
    bytes: ByteStream | Uint8Array | (() => ByteStream),
    options: UploadOptions & { readonly domainId?: string },
  ): Promise<string>;
  /**
   * Many items at once, several of them in one request: next to nothing each beside an {@link upload} of its own. Resolves with their ids,
   * in order. After an error those of the requests that were answered are there.
   *
   * @throws MillraceError `already_exists` for a taken name
   */
  uploadItems(
    items: readonly NewItem[],
    options?: CallOptions & { readonly domainId?: string },
  ): Promise<string[]>;
  /** Storage as this requestor, for inputs and artifacts. */
  readonly storage: DomainStorage;
  /** Code by digest, for tasks that name it. */
  readonly computes: Computes;
  close(): Promise<void>;
}

export interface RequestorOptions {
  /** Origin of the dispatcher, e.g. `http://127.0.0.1:7070`. */
  readonly url: string;
  /** Client token. */
  readonly token: string;
  /** Per request, milliseconds. Default 30,000. */
  readonly timeoutMs?: number;
}
