-- Content-addressed code. The bytes are in the blob store under the same digest; a row keeps them from being collected.
-- seq is the order of the first upload.
CREATE TABLE computes (
  seq        INTEGER PRIMARY KEY,
  digest     TEXT NOT NULL UNIQUE,
  engine     TEXT NOT NULL,
  size       INTEGER NOT NULL,
  created_at INTEGER NOT NULL
) STRICT;

-- Unfinished jobs that may be completed from earlier results. A table of its own, so that a task of any other job costs
-- no column and no look-up.
CREATE TABLE memo_jobs (
  job_seq INTEGER PRIMARY KEY
) STRICT;

-- The newest completion of each piece of work that declared itself deterministic. outputs is a JSON array of [data id, digest]:
-- the memo holds while each of them is there and still has those bytes.
CREATE TABLE memos (
  key      TEXT PRIMARY KEY,
  task_seq INTEGER NOT NULL,
  outputs  TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX memos_task ON memos (task_seq);
