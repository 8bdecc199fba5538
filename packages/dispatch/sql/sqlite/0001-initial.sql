-- The dispatcher's database. Times are milliseconds since the Unix epoch; names are the wire's where a wire exists.
-- There are no foreign keys: the store is the only writer, deletes whole jobs by range, and the checks would cost a
-- look-up per inserted task. Hot tables spell `IN` checks as `OR`: SQLite builds a table for an IN list at every execution.

CREATE TABLE settings (
  name  TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE nodes (
  id              TEXT PRIMARY KEY,
  name            TEXT NOT NULL,
  mode            TEXT NOT NULL CHECK (mode IN ('public', 'dedicated')),
  organization_id TEXT NOT NULL,
  secret_hash     TEXT NOT NULL,
  wallet          TEXT UNIQUE,
  capabilities    TEXT NOT NULL DEFAULT '[]',
  labels          TEXT NOT NULL DEFAULT '{}',
  version         TEXT,
  max_concurrency INTEGER NOT NULL DEFAULT 1 CHECK (max_concurrency >= 1),
  created_at      INTEGER NOT NULL,
  registered_at   INTEGER,
  last_seen_at    INTEGER
) STRICT;

CREATE TABLE nonces (
  nonce      TEXT PRIMARY KEY,
  body       TEXT NOT NULL,
  expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX nonces_expiry ON nonces (expires_at);

-- One row for each distinct set of demands on a node. Matching a node against its queues instead of against tasks makes
-- leasing independent of how many tasks wait for other nodes. An organization of '' is none.
CREATE TABLE queues (
  id              INTEGER PRIMARY KEY,
  capability      TEXT NOT NULL,
  filters         TEXT NOT NULL,
  mode            TEXT NOT NULL CHECK (mode IN ('public', 'dedicated')),
  organization_id TEXT NOT NULL,
  UNIQUE (capability, filters, mode, organization_id)
) STRICT;

-- seq is the order of submission. The tasks of a job have consecutive seqs from first_task on, so "the tasks of a job" is a
-- range of the primary key and needs no index.
CREATE TABLE jobs (
  seq                 INTEGER PRIMARY KEY,
  id                  TEXT NOT NULL UNIQUE,
  domain_id           TEXT NOT NULL,
  organization_id     TEXT,
  priority            INTEGER NOT NULL,
  created_at          INTEGER NOT NULL,
  deadline_at         INTEGER,
  first_task          INTEGER NOT NULL,
  task_count          INTEGER NOT NULL,
  status              TEXT NOT NULL CHECK (status = 'completed' OR status = 'running' OR status = 'pending' OR status = 'failed' OR status = 'canceled'),
  updated_at          INTEGER NOT NULL,
  cancel_requested_at INTEGER,
  last_event          INTEGER NOT NULL,
  queued              INTEGER NOT NULL CHECK (queued >= 0),
  leased              INTEGER NOT NULL CHECK (leased >= 0),
  running             INTEGER NOT NULL CHECK (running >= 0),
  completed           INTEGER NOT NULL CHECK (completed >= 0),
  failed              INTEGER NOT NULL CHECK (failed >= 0),
  canceled            INTEGER NOT NULL CHECK (canceled >= 0)
) STRICT;

-- What is only read to be shown. Kept apart so that counting a task does not rewrite it.
CREATE TABLE job_specs (
  job_seq INTEGER PRIMARY KEY,
  spec    TEXT NOT NULL
) STRICT;

CREATE TABLE submissions (
  submitter TEXT NOT NULL,
  key       TEXT NOT NULL,
  spec_hash TEXT NOT NULL,
  job_seq   INTEGER NOT NULL,
  PRIMARY KEY (submitter, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX submissions_job ON submissions (job_seq);

-- Only stages that an edge names: the others are runnable from the start and nobody waits for them.
CREATE TABLE stages (
  job_seq        INTEGER NOT NULL,
  stage          INTEGER NOT NULL CHECK (stage >= 1),
  name           TEXT NOT NULL,
  first_task     INTEGER NOT NULL,
  last_task      INTEGER NOT NULL,
  remaining      INTEGER NOT NULL CHECK (remaining >= 0),
  deps_remaining INTEGER NOT NULL CHECK (deps_remaining >= 0),
  PRIMARY KEY (job_seq, stage)
) STRICT, WITHOUT ROWID;

CREATE TABLE stage_edges (
  job_seq    INTEGER NOT NULL,
  from_stage INTEGER NOT NULL,
  to_stage   INTEGER NOT NULL,
  PRIMARY KEY (job_seq, from_stage, to_stage)
) STRICT, WITHOUT ROWID;

-- The part of a task that changes. stage is 0 for a stage without edges. wake_at is when the sweeper must look at the task:
-- its lease expires, its retry is due or its deadline passes.
CREATE TABLE tasks (
  seq                 INTEGER PRIMARY KEY,
  id                  TEXT NOT NULL UNIQUE,
  job_seq             INTEGER NOT NULL,
  stage               INTEGER NOT NULL,
  queue_id            INTEGER NOT NULL,
  priority            INTEGER NOT NULL,
  max_attempts        INTEGER NOT NULL,
  deadline_at         INTEGER,
  state               TEXT NOT NULL,
  wake_at             INTEGER,
  attempts            INTEGER NOT NULL CHECK (attempts >= 0),
  node_faults         INTEGER NOT NULL,
  drains              INTEGER NOT NULL,
  lease_id            TEXT,
  node_id             TEXT,
  leased_at           INTEGER,
  lease_expires_at    INTEGER,
  last_heartbeat_at   INTEGER,
  not_before          INTEGER,
  cancel_requested_at INTEGER,
  updated_at          INTEGER NOT NULL,
  reason              TEXT,
  CHECK ((state = 'leased' OR state = 'running') = (lease_id IS NOT NULL))
) STRICT;
CREATE INDEX tasks_ready ON tasks (queue_id, priority DESC, seq) WHERE state = 'ready';
CREATE INDEX tasks_wake ON tasks (wake_at) WHERE wake_at IS NOT NULL;

-- What a task was submitted with, as a JSON array: label, stage, inputs_cids (resolved once runnable), outputs_prefix, meta.
CREATE TABLE task_specs (
  task_seq INTEGER PRIMARY KEY,
  spec     TEXT NOT NULL
) STRICT;

-- What heartbeats brought: the newest progress and the last few events, as JSON.
CREATE TABLE task_reports (
  task_seq INTEGER PRIMARY KEY,
  progress TEXT NOT NULL,
  events   TEXT NOT NULL
) STRICT;

-- One row for each attempt that ended, in the order they ended; the receipts of the wire.
CREATE TABLE attempts (
  task_seq   INTEGER NOT NULL,
  no         INTEGER NOT NULL,
  lease_id   TEXT NOT NULL,
  node_id    TEXT NOT NULL,
  outcome    TEXT NOT NULL,
  outputs    TEXT NOT NULL,
  meta       TEXT NOT NULL,
  reason     TEXT,
  leased_at  INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  PRIMARY KEY (task_seq, no)
) STRICT, WITHOUT ROWID;

-- The event stream of a job, in rows of many events: one transaction adds at most a few rows per job however many of its
-- tasks it moved. body is a JSON array of [ms after at, kind, task, data]: kind is a position in the store's list of kinds,
-- task counts from the job's first task (-1: the job itself), data is left out when empty. The last event has the number
-- last_seq.
CREATE TABLE events (
  job_seq  INTEGER NOT NULL,
  last_seq INTEGER NOT NULL,
  count    INTEGER NOT NULL,
  at       INTEGER NOT NULL,
  body     TEXT NOT NULL,
  PRIMARY KEY (job_seq, last_seq)
) STRICT, WITHOUT ROWID;

-- job_id: the job under whose lease it was created; NULL when a requestor did.
CREATE TABLE data (
  id         TEXT PRIMARY KEY,
  domain_id  TEXT NOT NULL,
  name       TEXT NOT NULL,
  data_type  TEXT NOT NULL,
  digest     TEXT NOT NULL,
  size       INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  updated_at INTEGER NOT NULL,
  job_id     TEXT,
  UNIQUE (domain_id, name)
) STRICT;
CREATE INDEX data_digest ON data (digest);

CREATE TABLE uploads (
  id          TEXT PRIMARY KEY,
  domain_id   TEXT NOT NULL,
  expires_at  INTEGER NOT NULL,
  body        TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX uploads_expiry ON uploads (expires_at);

CREATE TABLE upload_parts (
  upload_id   TEXT NOT NULL,
  part_number INTEGER NOT NULL,
  etag        TEXT NOT NULL,
  size        INTEGER NOT NULL,
  PRIMARY KEY (upload_id, part_number)
) STRICT, WITHOUT ROWID;
