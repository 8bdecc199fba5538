export { DEFAULT_LIMITS, openDispatcher } from './server.ts';
export type { Dispatcher, DispatcherLimits, DispatcherOptions } from './dispatcher.ts';
export { openSqliteStore } from './stores/sqlite.ts';
export type { SqliteStoreOptions } from './stores/sqlite.ts';
export { openFileBlobs } from './blobs/files.ts';
export { parseJobSpec } from './job-spec.ts';
export type { JobSpecOptions } from './job-spec.ts';
export type { BlobInfo, BlobStore, PutOptions } from './blobs.ts';
export { JOB_STATUSES, TASK_STATUSES } from './records.ts';
export type {
  AttemptOutcome,
  BusyNode,
  DataRecord,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  JobStatus,
  NodeMode,
  NodeRecord,
  ReceiptRecord,
  TaskRecord,
  TaskStatus,
  TaskSubmission,
  TasksSummary,
} from './records.ts';
export type {
  CompleteItem,
  DataQuery,
  DataWrite,
  FailItem,
  GrantedLease,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRef,
  LeaseRequest,
  ListJobsQuery,
  NewJob,
  NewNode,
  NodeRegistration,
  Nonce,
  Outcome,
  ReleaseItem,
  Store,
  StoreChange,
  StoreStats,
  SweepAnswer,
  UploadRecord,
} from './store.ts';
