-- What tasks cost. Until now a task was a row of its own in each of tasks, open_tasks, ended_tasks and attempts, whatever
-- happened to it. From here on only what a node holds, or what waits with a history of its own, is a row of its own (open_tasks):
-- what was submitted is in blocks, what waits to be leased for the first time in ranges, and what ended in runs.

-- Queues by domain: what is ordered by priority and age.
CREATE TABLE lanes (
  id        integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  queue_id  integer NOT NULL,
  domain_id text COLLATE "C" NOT NULL,
  UNIQUE (queue_id, domain_id)
);

-- What tasks were submitted with, 64 to a row: task no is line no % 64 of block no / 64. A line is a JSON array: id (null: made
-- from its job's), stage number, queue, priority, max_attempts, deadline, label, stage, inputs_cids, outputs_prefix, meta,
-- not_before. It is empty where the text is long or may change, and then in task_specs. Never changed.
CREATE TABLE task_blocks (
  job_seq bigint NOT NULL,
  block   integer NOT NULL,
  body    text NOT NULL,
  PRIMARY KEY (job_seq, block)
) WITH (toast_tuple_target = 8160);

CREATE TABLE task_specs (
  job_seq bigint NOT NULL,
  no      integer NOT NULL,
  spec    text NOT NULL,
  PRIMARY KEY (job_seq, no)
);

-- Tasks that are ready and were never leased, from first_no to last_no: of one lane, priority and block. Leasing takes from
-- their beginning, so first_no is in no index. What else is ready has a row in open_tasks.
CREATE TABLE fresh (
  lane_id  integer NOT NULL,
  rank     bigint NOT NULL,
  job_seq  bigint NOT NULL,
  first_no integer NOT NULL,
  last_no  integer NOT NULL,
  since    bigint NOT NULL,
  PRIMARY KEY (lane_id, rank, job_seq, last_no),
  CHECK (first_no <= last_no)
) WITH (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX fresh_job ON fresh (job_seq);

-- Tasks that ended in one transaction and in the same way, from first_no to last_no, all of one block. A line of body is a JSON
-- array: attempts, node_faults, drains, last_heartbeat_at, cancel_requested_at, reason; of a completed task also the attempt that
-- completed it: its number, lease_id, node_id, leased_at, outputs, meta.
CREATE TABLE ended_runs (
  job_seq    bigint NOT NULL,
  first_no   integer NOT NULL,
  last_no    integer NOT NULL,
  state      text NOT NULL CHECK (state IN ('completed', 'failed', 'canceled')),
  updated_at bigint NOT NULL,
  body       text NOT NULL,
  PRIMARY KEY (job_seq, first_no),
  CHECK (first_no <= last_no AND first_no >> 6 = last_no >> 6)
) WITH (toast_tuple_target = 8160);
-- Tasks that failed for good; each is a run of its own.
CREATE INDEX ended_runs_failed ON ended_runs (job_seq, first_no) WHERE state = 'failed';

-- The ids of a job's tasks are made from its own, unless it was submitted before this: then they are in task_ids.
ALTER TABLE jobs ADD COLUMN own_task_ids boolean NOT NULL DEFAULT false;
ALTER TABLE jobs ADD COLUMN traceparent text;

UPDATE jobs j SET own_task_ids = true, traceparent = substring(
  s.spec FROM '\],"traceparent":"([^"]*)"(?:,"not_before":"[^"]*")?(?:,"redrive_of":"(?:[^"\\]|\\.)*")?\}$')
FROM job_specs s WHERE s.job_seq = j.seq;

INSERT INTO lanes (queue_id, domain_id)
SELECT DISTINCT o.queue_id, j.domain_id FROM open_tasks o JOIN jobs j ON j.seq = o.job_seq;

CREATE FUNCTION spec_line(t tasks) RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT '[' || concat_ws(',', to_json(t.id)::text, t.stage, t.queue_id, t.priority, t.max_attempts,
    coalesce(t.deadline_at::text, 'null')) || ',' || substr(t.spec, 2)
$$;
INSERT INTO task_blocks (job_seq, block, body)
SELECT job_seq, no >> 6, string_agg(CASE WHEN is_long THEN '' ELSE line END, E'\n' ORDER BY no)
FROM (
  SELECT t.job_seq, t.no, spec_line(t) AS line,
    length(t.spec) > 512 OR t.spec LIKE '%"stage:%' AND o.state IS NOT DISTINCT FROM 'blocked' AS is_long
  FROM tasks t LEFT JOIN open_tasks o ON o.job_seq = t.job_seq AND o.no = t.no) AS lines
GROUP BY job_seq, no >> 6;
INSERT INTO task_specs (job_seq, no, spec)
SELECT t.job_seq, t.no, spec_line(t) FROM tasks t LEFT JOIN open_tasks o ON o.job_seq = t.job_seq AND o.no = t.no
WHERE length(t.spec) > 512 OR t.spec LIKE '%"stage:%' AND o.state IS NOT DISTINCT FROM 'blocked';
DROP FUNCTION spec_line;

INSERT INTO ended_runs (job_seq, first_no, last_no, state, updated_at, body)
SELECT e.job_seq, e.no, e.no, e.state, e.updated_at, '[' || concat_ws(',', e.attempts, e.node_faults, e.drains,
    coalesce(e.last_heartbeat_at::text, 'null'), coalesce(e.cancel_requested_at::text, 'null'),
    coalesce(to_json(e.reason)::text, 'null'),
    a.attempt, to_json(a.lease_id)::text, to_json(a.node_id)::text, a.leased_at, a.outputs, a.meta) || ']'
FROM ended_tasks e
LEFT JOIN attempts a ON a.job_seq = e.job_seq AND a.no = e.no AND a.outcome = 'completed' AND e.state = 'completed';
DROP TABLE ended_tasks;
-- Attempts that completed their task are in the runs.
DELETE FROM attempts WHERE outcome = 'completed';

ALTER TABLE open_tasks ADD COLUMN lane_id integer;
ALTER TABLE open_tasks ADD COLUMN stage integer;
ALTER TABLE open_tasks ADD COLUMN max_attempts integer;
UPDATE open_tasks o SET lane_id = l.id, stage = t.stage, max_attempts = t.max_attempts
FROM tasks t, jobs j, lanes l
WHERE t.job_seq = o.job_seq AND t.no = o.no AND j.seq = o.job_seq AND l.queue_id = o.queue_id AND l.domain_id = j.domain_id;
DROP INDEX open_tasks_ready;
ALTER TABLE open_tasks DROP COLUMN queue_id, ALTER COLUMN lane_id SET NOT NULL, ALTER COLUMN stage SET NOT NULL,
  ALTER COLUMN max_attempts SET NOT NULL;
CREATE INDEX open_tasks_ready ON open_tasks (lane_id, rank, job_seq, no) WHERE state = 'ready';

ALTER TABLE tasks RENAME TO task_ids;
ALTER TABLE task_ids DROP COLUMN stage, DROP COLUMN queue_id, DROP COLUMN priority, DROP COLUMN max_attempts,
  DROP COLUMN deadline_at, DROP COLUMN label, DROP COLUMN spec;
