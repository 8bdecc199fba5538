-- Weights of domains other than 1.
CREATE TABLE domains (
  domain_id TEXT PRIMARY KEY,
  weight    INTEGER NOT NULL CHECK (weight BETWEEN 1 AND 1000)
) STRICT, WITHOUT ROWID;

-- What a node has to give: a JSON object of names and amounts. NULL: it does not say.
ALTER TABLE nodes ADD COLUMN resources TEXT;

-- What a task takes of a node is one of its demands. JSON; '' is nothing.
CREATE TABLE new_queues (
  id              INTEGER PRIMARY KEY,
  capability      TEXT NOT NULL,
  filters         TEXT NOT NULL,
  mode            TEXT NOT NULL CHECK (mode IN ('public', 'dedicated')),
  organization_id TEXT NOT NULL,
  resources       TEXT NOT NULL,
  blocked         INTEGER NOT NULL DEFAULT 0 CHECK (blocked >= 0),
  delayed         INTEGER NOT NULL DEFAULT 0 CHECK (delayed >= 0),
  UNIQUE (capability, filters, mode, organization_id, resources)
) STRICT;
INSERT INTO new_queues
  SELECT id, capability, filters, mode, organization_id, '', blocked, delayed FROM queues;
DROP TABLE queues;
ALTER TABLE new_queues RENAME TO queues;

-- Ready tasks of one queue and domain, with one concurrency key and limit (NULL: without): all of them may be leased at a time or
-- none. Lanes come with their first task, and those that are empty go when there are many.
CREATE TABLE lanes (
  id        INTEGER PRIMARY KEY,
  queue_id  INTEGER NOT NULL,
  domain_id TEXT NOT NULL,
  key       TEXT,
  key_limit INTEGER,
  CHECK ((key IS NULL) = (key_limit IS NULL))
) STRICT;

-- As before, but by lane. So a range is of one domain, and one that was of several is one for each of its jobs now.
CREATE TABLE new_ready (
  lane_id    INTEGER NOT NULL,
  priority   INTEGER NOT NULL,
  first_task INTEGER NOT NULL,
  last_task  INTEGER NOT NULL,
  since      INTEGER NOT NULL,
  fresh      INTEGER NOT NULL,
  PRIMARY KEY (lane_id, priority DESC, first_task),
  CHECK (first_task <= last_task)
) STRICT, WITHOUT ROWID;
CREATE TEMP TABLE old_ready AS
  SELECT queue_id, domain_id, ready.priority, max(ready.first_task, jobs.first_task) AS first_task,
    min(last_task, jobs.first_task + task_count - 1) AS last_task, since, fresh
  FROM (
    SELECT *,
      (SELECT job_seq FROM task_specs WHERE first_task <= r.first_task ORDER BY first_task DESC LIMIT 1) AS first_job,
      (SELECT job_seq FROM task_specs WHERE first_task <= r.last_task ORDER BY first_task DESC LIMIT 1) AS last_job
    FROM ready AS r) AS ready
  JOIN jobs ON jobs.seq BETWEEN first_job AND last_job;
INSERT INTO lanes (queue_id, domain_id) SELECT DISTINCT queue_id, domain_id FROM old_ready;
INSERT INTO new_ready
  SELECT lanes.id, priority, first_task, last_task, since, fresh
  FROM old_ready JOIN lanes USING (queue_id, domain_id);
DROP TABLE old_ready;
DROP TABLE ready;
ALTER TABLE new_ready RENAME TO ready;

-- The array of a task in the body of task_specs may go on with two more: when it may be given out at the earliest (or null), and
-- an array of its concurrency key and limit.
