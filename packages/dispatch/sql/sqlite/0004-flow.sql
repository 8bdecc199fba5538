-- What a job made, so that it can go with the job.
CREATE INDEX data_job ON data (job_id) WHERE job_id IS NOT NULL;

-- job_seq does again what the job source_id left undone.
CREATE TABLE redrives (
  source_id TEXT NOT NULL,
  job_seq   INTEGER NOT NULL,
  PRIMARY KEY (source_id, job_seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX redrives_job ON redrives (job_seq);

-- Tasks that wait for an earlier stage, and for their time. Those that are ready or held are counted from their own tables.
ALTER TABLE queues ADD COLUMN blocked INTEGER NOT NULL DEFAULT 0 CHECK (blocked >= 0);
ALTER TABLE queues ADD COLUMN delayed INTEGER NOT NULL DEFAULT 0 CHECK (delayed >= 0);
UPDATE queues SET blocked = waiting.tasks FROM (
  SELECT json_extract(task.value, '$[1]') AS queue_id, count(*) AS tasks
  FROM stages JOIN jobs ON jobs.seq = stages.job_seq JOIN task_specs ON task_specs.job_seq = stages.job_seq
    JOIN json_each(task_specs.body) AS task
  WHERE stages.deps_remaining > 0 AND jobs.queued > 0 AND json_extract(task.value, '$[0]') = stages.stage
    AND NOT EXISTS (SELECT 1 FROM tasks WHERE seq = task_specs.first_task + task.key)
  GROUP BY 1) AS waiting
WHERE waiting.queue_id = queues.id;
UPDATE queues SET delayed = waiting.tasks FROM (
  SELECT json_extract(task.value, '$[1]') AS queue_id, count(*) AS tasks
  FROM jobs JOIN task_specs ON task_specs.job_seq = jobs.seq JOIN json_each(task_specs.body) AS task
    JOIN tasks ON tasks.seq = task_specs.first_task + task.key
  WHERE jobs.queued > 0 AND tasks.state = 'delayed'
  GROUP BY 1) AS waiting
WHERE waiting.queue_id = queues.id;

-- Jobs that are submitted at set times. body is JSON: what does not change. A due tick is claimed for a while by the dispatcher
-- that submits it; a revision is never used again, so that a schedule that took another's name submits jobs of its own.
CREATE TABLE schedules (
  domain_id     TEXT NOT NULL,
  name          TEXT NOT NULL,
  revision      TEXT NOT NULL UNIQUE,
  body          TEXT NOT NULL,
  created_at    INTEGER NOT NULL,
  next_at       INTEGER,
  claimed_until INTEGER,
  last_tick_at  INTEGER,
  last_outcome  TEXT,
  last_job_id   TEXT,
  PRIMARY KEY (domain_id, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX schedules_next ON schedules (next_at) WHERE next_at IS NOT NULL;
