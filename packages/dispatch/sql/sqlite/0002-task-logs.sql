-- What attempts said: one append-only stream of bytes for each attempt that said something. attempt counts the task's leases
-- from 1. There is no length beside it: the last chunk tells it, and an append writes one row.
CREATE TABLE task_logs (
  id      INTEGER PRIMARY KEY,
  job_id  TEXT NOT NULL,
  task_id TEXT NOT NULL,
  attempt INTEGER NOT NULL CHECK (attempt >= 1),
  UNIQUE (task_id, attempt)
) STRICT;
CREATE INDEX task_logs_job ON task_logs (job_id);

-- start is the offset of the first byte. A table with row ids and an index, since the index stays flat whatever the size of
-- the chunks.
CREATE TABLE task_log_chunks (
  log_id INTEGER NOT NULL,
  start  INTEGER NOT NULL CHECK (start >= 0),
  bytes  BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX task_log_chunks_start ON task_log_chunks (log_id, start);
