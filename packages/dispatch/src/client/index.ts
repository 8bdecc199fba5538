export { NO_FEATURES } from './dms.ts';
export type {
  ArtifactReport,
  CallOptions,
  Completion,
  Dms,
  EndingReport,
  ExchangeResult,
  Features,
  HeartbeatReply,
  LeaseHandle,
  LeaseQuery,
  LeaseResult,
  LogAnswer,
  LogPiece,
  ReceivedLease,
  ServerTime,
  TokenSource,
} from './dms.ts';
export type {
  DataItem,
  DomainStorage,
  DomainStorageOptions,
  DownloadPart,
  DownloadQuery,
  NewItem,
  StartUpload,
  StorageInfo,
  UploadSession,
  UploadTarget,
} from './domain.ts';
export { formatResources, parseResourceList, parseResources } from '../resources.ts';
export type { Resources } from '../resources.ts';
export type { AbleNodes, CapabilityEntry, QueueEntry, QueueReport, WaitingWork } from '../queue-report.ts';
export type {
  EndedAttempt,
  JobExplanation,
  Reason,
  ReasonCode,
  ReasonGroup,
  TaskExplanation,
} from '../explain.ts';
export type {
  JobSubmission,
  JobsPage,
  ListedSchedule,
  ScheduleDraft,
  Requestor,
  RequestorOptions,
  SubmitOptions,
  TaskDraft,
  TaskLogPage,
} from './requestor.ts';
export { retrying } from './retrying.ts';
export type { UploadOptions } from './upload.ts';
export { HttpDms, openHttpDms } from './http-dms.ts';
export type { HttpDmsOptions } from './http-dms.ts';
export { connect } from './http-requestor.ts';
export { openHttpDds } from './http-dds.ts';
export type { HttpDdsOptions } from './http-dds.ts';
export type { Dds, NodeToken, RegisterWalletRequest, SiweChallenge } from './dds.ts';
export {
  generatePrivateKeyHex,
  parseSiweMessage,
  recoverAddress,
  signMessage,
  siweMessage,
  walletAddress,
} from '../siwe.ts';
export type { SiweMessage } from '../siwe.ts';
export { openComputes } from './http-computes.ts';
export type { ComputeName, ComputeStat, Computes, ComputesOptions, ComputesPage } from './computes.ts';
export { openDomainPool, openDomainStorage, singleUploadBytes } from './http-domain.ts';
export type { DomainPool } from './http-domain.ts';
export { readableFrom, untilAborted } from '../pull-stream.ts';
export type { Pull, PullSource } from '../pull-stream.ts';
export { MAX_DATA_NAME_BYTES, checkDataName } from '../data-names.ts';
export { DEFAULT_BODY_BYTES, HttpOrigin, codeOfStatus, previewBody, statusError } from './http.ts';
export type { HttpOriginOptions, HttpRequest, HttpResponse } from './http.ts';
export type { ProxySettings } from './proxy.ts';
export type {
  BusyNode,
  ComputeRecord,
  JobDetail,
  JobEvent,
  JobRecord,
  JobStatus,
  NodeMode,
  NodeRecord,
  ReceiptRecord,
  TaskRecord,
  TaskStatus,
  TasksSummary,
} from '../records.ts';
