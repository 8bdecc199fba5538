export { DEFAULT_LIMITS, openDispatcher } from './server.ts';
export type { Dispatcher, DispatcherLimits, DispatcherOptions, Retention } from './dispatcher.ts';
export { openSqliteStore } from './stores/sqlite.ts';
export type { SqliteStoreOptions } from './stores/sqlite.ts';
export { openFileBlobs } from './blobs/files.ts';
export { parseJobSpec } from './job-spec.ts';
export type { JobSpecOptions } from './job-spec.ts';
export type { BlobInfo, BlobStore, PutOptions } from './blobs.ts';
export { JOB_STATUSES, MAX_WEIGHT, TASK_STATUSES } from './records.ts';
export type { Resources } from './resources.ts';
export type {
  AttemptOutcome,
  BusyNode,
  ComputeRecord,
  ConcurrencyLimit,
  DataRecord,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  JobStatus,
  NodeMode,
  NodeRecord,
  ReceiptRecord,
  ScheduleOutcome,
  ScheduleRecord,
  TaskRecord,
  TaskStatus,
  TaskSubmission,
  TasksSummary,
} from './records.ts';
export type {
  ClaimedSchedules,
  CompleteItem,
  ComputeWrite,
  DataQuery,
  DataWrite,
  DeadTasksQuery,
  DueSchedule,
  EndedTick,
  FailItem,
  GrantedLease,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRef,
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
} from './store.ts';
