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
-- range; a task's id is made from its job's id and its place in that range. Neither needs an index.
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

-- Only stages that an edge names: the others are runnable from the start and nobody waits for them. opened_at is when the
-- last preceding stage completed.
CREATE TABLE stages (
  job_seq        INTEGER NOT NULL,
  stage          INTEGER NOT NULL CHECK (stage >= 1),
  name           TEXT NOT NULL,
  first_task     INTEGER NOT NULL,
  last_task      INTEGER NOT NULL,
  remaining      INTEGER NOT NULL CHECK (remaining >= 0),
  deps_remaining INTEGER NOT NULL CHECK (deps_remaining >= 0),
  opened_at      INTEGER,
  PRIMARY KEY (job_seq, stage)
) STRICT, WITHOUT ROWID;

CREATE TABLE stage_edges (
  job_seq    INTEGER NOT NULL,
  from_stage INTEGER NOT NULL,
  to_stage   INTEGER NOT NULL,
  PRIMARY KEY (job_seq, from_stage, to_stage)
) STRICT, WITHOUT ROWID;

-- What tasks were submitted with, in rows of many neighbours, never changed. body is a JSON array with an array for each task:
-- stage number (0: a stage without edges), queue, priority, max_attempts, deadline, label, stage (null: as the label),
-- inputs_cids, outputs_prefix, meta.
CREATE TABLE task_specs (
  first_task INTEGER PRIMARY KEY,
  job_seq    INTEGER NOT NULL,
  body       TEXT NOT NULL
) STRICT;

-- The inputs of tasks that named the outputs of an earlier stage, once these are known: a JSON array.
CREATE TABLE task_inputs (
  task_seq INTEGER PRIMARY KEY,
  inputs   TEXT NOT NULL
) STRICT;

-- Where a task stands, from its first lease on, or from its end if that comes first. A task without a row waits as it was
-- submitted: blocked while a stage before its own is not complete, else ready. The id of the lease is made from leased_at and
-- lease_no. ending is the number of the row of endings that has the newest of its own; 0 while there is none.
CREATE TABLE tasks (
  seq                 INTEGER PRIMARY KEY,
  state               TEXT NOT NULL,
  attempts            INTEGER NOT NULL CHECK (attempts >= 0),
  node_faults         INTEGER NOT NULL,
  drains              INTEGER NOT NULL,
  node_id             TEXT,
  lease_no            INTEGER,
  leased_at           INTEGER,
  lease_expires_at    INTEGER,
  last_heartbeat_at   INTEGER,
  not_before          INTEGER,
  cancel_requested_at INTEGER,
  updated_at          INTEGER NOT NULL,
  reason              TEXT,
  ending              INTEGER NOT NULL,
  CHECK ((state = 'leased' OR state = 'running') = (lease_no IS NOT NULL))
) STRICT;

-- The tasks in state ready, as ranges: those from first_task to last_task are of one queue and priority and became ready
-- together, so that a job of a thousand like tasks is one row. fresh: none of them has a row in tasks yet.
CREATE TABLE ready (
  queue_id   INTEGER NOT NULL,
  priority   INTEGER NOT NULL,
  first_task INTEGER NOT NULL,
  last_task  INTEGER NOT NULL,
  since      INTEGER NOT NULL,
  fresh      INTEGER NOT NULL,
  PRIMARY KEY (queue_id, priority DESC, first_task),
  CHECK (first_task <= last_task)
) STRICT, WITHOUT ROWID;

-- When the sweeper must look at a task that nobody holds: its retry is due or its deadline passes. Leases are watched in
-- memory.
CREATE TABLE wakes (
  at       INTEGER NOT NULL,
  task_seq INTEGER NOT NULL,
  PRIMARY KEY (at, task_seq)
) STRICT, WITHOUT ROWID;

-- What heartbeats brought: the newest progress and the last few events, as JSON.
CREATE TABLE task_reports (
  task_seq INTEGER PRIMARY KEY,
  progress TEXT NOT NULL,
  events   TEXT NOT NULL
) STRICT;

-- How attempts ended, the receipts of the wire, in rows of many: one transaction adds at most a few rows per job however
-- many of its tasks it ended. body is a JSON array with an array for each ending, in their order: task counted from the job's
-- first, row with the ending of that task before this one (0: none), ms after at, outcome as a position in the store's list,
-- lease_no, leased_at, node (0: as before), outputs, meta, reason.
CREATE TABLE endings (
  job_seq INTEGER NOT NULL,
  no      INTEGER NOT NULL CHECK (no >= 1),
  at      INTEGER NOT NULL,
  body    TEXT NOT NULL,
  PRIMARY KEY (job_seq, no)
) STRICT, WITHOUT ROWID;

-- The event stream of a job, in rows of many events like endings. body is a JSON array with an array for each kind of change:
-- ms after at, kind as a position in the store's list, task counted from the job's first (-1: the job itself), data (left out
-- or 0: empty), number of tasks it happened to, from that one on (left out: 1). The data of a lease is node, attempt and
-- lease_no, which counts up with the tasks. The last event has the number last_seq.
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
