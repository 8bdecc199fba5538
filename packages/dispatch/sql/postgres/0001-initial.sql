-- The dispatchers' database, in the schema millrace. Times are milliseconds since the Unix epoch; names are the wire's where
-- a wire exists. JSON is kept as text: nothing looks into it here, and jsonb refuses the character U+0000 that JSON allows.
-- Ids are text, since they come from outside and any text may be asked for.
--
-- What changes often is small and apart from what is only kept: a task is a row of tasks (what was submitted, never
-- changed but for resolved inputs) and a row of open_tasks while something is to be done for it, of ended_tasks afterwards.
-- There are no foreign keys: the store is the only writer and deletes whole jobs.

CREATE FUNCTION millis(given bigint) RETURNS bigint LANGUAGE sql VOLATILE AS
  'SELECT coalesce(given, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint)';

CREATE TABLE settings (
  name  text COLLATE "C" PRIMARY KEY,
  value text NOT NULL
);

-- What makes a commit whose answer was lost decidable, and the counts of tasks and jobs: every transaction that writes leaves
-- its serial with its writer, and adds what it changed to the writer's counts. The sum over all writers is the truth.
-- A serial that is not newer than the kept one becomes -1, which the check refuses: that transaction was given up.
CREATE TABLE writers (
  id        text COLLATE "C" PRIMARY KEY,
  serial    bigint NOT NULL CHECK (serial >= 0),
  at        bigint NOT NULL,
  queued    bigint NOT NULL DEFAULT 0,
  leased    bigint NOT NULL DEFAULT 0,
  running   bigint NOT NULL DEFAULT 0,
  completed bigint NOT NULL DEFAULT 0,
  failed    bigint NOT NULL DEFAULT 0,
  canceled  bigint NOT NULL DEFAULT 0,
  jobs_pending   bigint NOT NULL DEFAULT 0,
  jobs_running   bigint NOT NULL DEFAULT 0,
  jobs_completed bigint NOT NULL DEFAULT 0,
  jobs_failed    bigint NOT NULL DEFAULT 0,
  jobs_canceled  bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);

CREATE TABLE nodes (
  id              text COLLATE "C" PRIMARY KEY,
  name            text NOT NULL,
  mode            text NOT NULL CHECK (mode IN ('public', 'dedicated')),
  organization_id text NOT NULL,
  secret_hash     text NOT NULL,
  wallet          text COLLATE "C" CONSTRAINT nodes_wallet UNIQUE,
  capabilities    text NOT NULL DEFAULT '[]',
  labels          text NOT NULL DEFAULT '{}',
  version         text,
  max_concurrency integer NOT NULL DEFAULT 1 CHECK (max_concurrency >= 1),
  created_at      bigint NOT NULL,
  registered_at   bigint,
  last_seen_at    bigint
) WITH (fillfactor = 50);

CREATE TABLE nonces (
  nonce      text COLLATE "C" PRIMARY KEY,
  body       text NOT NULL,
  expires_at bigint NOT NULL
);
CREATE INDEX nonces_expiry ON nonces (expires_at);

-- One row for each distinct set of demands on a node, never changed. Matching a node against queues instead of against
-- tasks makes leasing independent of how many tasks wait for other nodes. key is a digest of the rest, which may be long.
CREATE TABLE queues (
  id              integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  key             text COLLATE "C" NOT NULL UNIQUE,
  capability      text NOT NULL,
  filters         text NOT NULL,
  mode            text NOT NULL CHECK (mode IN ('public', 'dedicated')),
  organization_id text
);

CREATE SEQUENCE job_numbers;

-- seq is the order of submission, as exactly as several dispatchers can have one. No column that changes is indexed, so that
-- counting a task stays within its page.
CREATE TABLE jobs (
  seq                 bigint PRIMARY KEY,
  id                  text COLLATE "C" NOT NULL UNIQUE,
  domain_id           text COLLATE "C" NOT NULL,
  organization_id     text,
  priority            bigint NOT NULL,
  created_at          bigint NOT NULL,
  deadline_at         bigint,
  task_count          integer NOT NULL,
  cache               boolean NOT NULL,
  status              text NOT NULL CHECK (status IN ('pending', 'running', 'completed', 'failed', 'canceled')),
  updated_at          bigint NOT NULL,
  cancel_requested_at bigint,
  last_event          bigint NOT NULL,
  queued              integer NOT NULL CHECK (queued >= 0),
  leased              integer NOT NULL CHECK (leased >= 0),
  running             integer NOT NULL CHECK (running >= 0),
  completed           integer NOT NULL CHECK (completed >= 0),
  failed              integer NOT NULL CHECK (failed >= 0),
  canceled            integer NOT NULL CHECK (canceled >= 0)
) WITH (fillfactor = 70);

CREATE INDEX jobs_domain ON jobs (domain_id, seq);

-- What is only read to be shown, and what a listing may ask for.
CREATE TABLE job_specs (
  job_seq      bigint PRIMARY KEY,
  capabilities text[] NOT NULL,
  spec         text NOT NULL
);

CREATE TABLE submissions (
  submitter text COLLATE "C" NOT NULL,
  key       text COLLATE "C" NOT NULL,
  spec_hash text NOT NULL,
  job_seq   bigint NOT NULL,
  PRIMARY KEY (submitter, key)
);
CREATE INDEX submissions_job ON submissions (job_seq);

-- Only stages that an edge names: the others are runnable from the start and nobody waits for them.
CREATE TABLE stages (
  job_seq        bigint NOT NULL,
  stage          integer NOT NULL CHECK (stage >= 1),
  name           text NOT NULL,
  first_task     integer NOT NULL,
  last_task      integer NOT NULL,
  remaining      integer NOT NULL CHECK (remaining >= 0),
  deps_remaining integer NOT NULL CHECK (deps_remaining >= 0),
  PRIMARY KEY (job_seq, stage)
) WITH (fillfactor = 80);

CREATE TABLE stage_edges (
  job_seq    bigint NOT NULL,
  from_stage integer NOT NULL,
  to_stage   integer NOT NULL,
  PRIMARY KEY (job_seq, from_stage, to_stage)
);

-- no is the position in the job, from 0; stage is 0 for a stage without edges. spec is a JSON array: label, stage,
-- inputs_cids (resolved once runnable), outputs_prefix, meta.
CREATE TABLE tasks (
  job_seq      bigint NOT NULL,
  no           integer NOT NULL,
  id           text COLLATE "C" NOT NULL UNIQUE,
  stage        integer NOT NULL,
  queue_id     integer NOT NULL,
  priority     bigint NOT NULL,
  max_attempts integer NOT NULL,
  deadline_at  bigint,
  label        text NOT NULL,
  spec         text NOT NULL,
  PRIMARY KEY (job_seq, no)
);

-- The hot table. rank is the priority negated, so that every column of the index is ascending. wake_at is when the sweeper must
-- look at the task: its lease expires, its retry is due or its deadline passes.
CREATE TABLE open_tasks (
  job_seq             bigint NOT NULL,
  no                  integer NOT NULL,
  queue_id            integer NOT NULL,
  rank                bigint NOT NULL,
  deadline_at         bigint,
  state               text NOT NULL CHECK (state IN ('blocked', 'delayed', 'ready', 'leased', 'running')),
  wake_at             bigint,
  attempts            integer NOT NULL CHECK (attempts >= 0),
  node_faults         integer NOT NULL,
  drains              integer NOT NULL,
  lease_id            text COLLATE "C",
  node_id             text COLLATE "C",
  leased_at           bigint,
  lease_expires_at    bigint,
  last_heartbeat_at   bigint,
  not_before          bigint,
  cancel_requested_at bigint,
  updated_at          bigint NOT NULL,
  reason              text,
  PRIMARY KEY (job_seq, no),
  CHECK ((state IN ('leased', 'running')) = (lease_id IS NOT NULL))
) WITH (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX open_tasks_ready ON open_tasks (queue_id, rank, job_seq, no) WHERE state = 'ready';
CREATE INDEX open_tasks_wake ON open_tasks (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX open_tasks_node ON open_tasks (node_id) WHERE node_id IS NOT NULL;

CREATE TABLE ended_tasks (
  job_seq             bigint NOT NULL,
  no                  integer NOT NULL,
  state               text NOT NULL CHECK (state IN ('completed', 'failed', 'canceled')),
  attempts            integer NOT NULL,
  node_faults         integer NOT NULL,
  drains              integer NOT NULL,
  last_heartbeat_at   bigint,
  cancel_requested_at bigint,
  updated_at          bigint NOT NULL,
  reason              text,
  PRIMARY KEY (job_seq, no)
);

-- What heartbeats brought: the newest progress and the last few events, as JSON.
CREATE TABLE task_reports (
  job_seq  bigint NOT NULL,
  no       integer NOT NULL,
  progress text NOT NULL,
  events   text NOT NULL,
  PRIMARY KEY (job_seq, no)
) WITH (fillfactor = 70);

-- One row for each attempt that ended, in the order they ended; the receipts of the wire.
CREATE TABLE attempts (
  job_seq    bigint NOT NULL,
  no         integer NOT NULL,
  attempt    integer NOT NULL,
  lease_id   text COLLATE "C" NOT NULL,
  node_id    text COLLATE "C" NOT NULL,
  outcome    text NOT NULL,
  outputs    text NOT NULL,
  meta       text NOT NULL,
  reason     text,
  leased_at  bigint NOT NULL,
  created_at bigint NOT NULL,
  PRIMARY KEY (job_seq, no, attempt)
);

-- The event stream of a job, in rows of many events: one transaction adds at most a few rows per job however many of its
-- tasks it moved. body is a JSON array of [ms after at, kind, task, data]: kind is a position in the store's list of kinds,
-- task the task's no (-1: the job itself), data is left out when empty. The last event has the number last_seq.
CREATE TABLE events (
  job_seq  bigint NOT NULL,
  last_seq bigint NOT NULL,
  count    integer NOT NULL,
  at       bigint NOT NULL,
  body     text NOT NULL,
  PRIMARY KEY (job_seq, last_seq)
);

-- What attempts said: one append-only stream of bytes for each attempt that said something. attempt counts the task's leases
-- from 1.
CREATE TABLE task_logs (
  job_seq bigint NOT NULL,
  no      integer NOT NULL,
  attempt integer NOT NULL CHECK (attempt >= 1),
  size    bigint NOT NULL,
  PRIMARY KEY (job_seq, no, attempt)
) WITH (fillfactor = 50);

CREATE TABLE task_log_chunks (
  job_seq bigint NOT NULL,
  no      integer NOT NULL,
  attempt integer NOT NULL,
  start   bigint NOT NULL CHECK (start >= 0),
  bytes   bytea NOT NULL,
  PRIMARY KEY (job_seq, no, attempt, start)
);

-- job_id: the job under whose lease it was created; NULL when a requestor did.
CREATE TABLE data (
  id         text COLLATE "C" CONSTRAINT data_id PRIMARY KEY,
  domain_id  text COLLATE "C" NOT NULL,
  name       text COLLATE "C" NOT NULL,
  data_type  text COLLATE "C" NOT NULL,
  digest     text COLLATE "C" NOT NULL,
  size       bigint NOT NULL,
  created_at bigint NOT NULL,
  updated_at bigint NOT NULL,
  job_id     text COLLATE "C",
  CONSTRAINT data_name UNIQUE (domain_id, name)
);
CREATE INDEX data_digest ON data (digest);

CREATE TABLE uploads (
  id         text COLLATE "C" PRIMARY KEY,
  domain_id  text COLLATE "C" NOT NULL,
  expires_at bigint NOT NULL,
  body       text NOT NULL
);
CREATE INDEX uploads_expiry ON uploads (expires_at);

CREATE TABLE upload_parts (
  upload_id   text COLLATE "C" NOT NULL,
  part_number integer NOT NULL,
  etag        text NOT NULL,
  size        bigint NOT NULL,
  PRIMARY KEY (upload_id, part_number)
);

-- Content-addressed code. The bytes are in the blob store under the same digest; a row keeps them from being collected.
CREATE TABLE computes (
  seq        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  digest     text COLLATE "C" NOT NULL UNIQUE,
  engine     text NOT NULL,
  size       bigint NOT NULL,
  created_at bigint NOT NULL
);

-- The newest completion of each piece of work that declared itself deterministic. outputs is a JSON array of [data id, digest]:
-- the memo holds while each of them is there and still has those bytes.
CREATE TABLE memos (
  key     text COLLATE "C" PRIMARY KEY,
  job_seq bigint NOT NULL,
  no      integer NOT NULL,
  outputs text NOT NULL
);
CREATE INDEX memos_job ON memos (job_seq);
