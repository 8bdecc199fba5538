-- Which domain's turn it is, how many tasks of a key run at once, and what fits on a node.

-- Only of domains that were given another weight than 1.
CREATE TABLE domains (
  domain_id text COLLATE "C" PRIMARY KEY,
  weight    integer NOT NULL CHECK (weight BETWEEN 1 AND 1000)
);

-- JSON; NULL: nothing is named.
ALTER TABLE queues ADD COLUMN resources text;
ALTER TABLE nodes ADD COLUMN resources text;

-- The keys of concurrency limits that open tasks have, and how many tasks these are. A row goes with its last open task.
CREATE TABLE limit_keys (
  id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  domain_id text COLLATE "C" NOT NULL,
  name      text COLLATE "C" NOT NULL,
  tasks     integer NOT NULL CHECK (tasks >= 0),
  held      integer NOT NULL CHECK (held >= 0),
  UNIQUE (domain_id, name)
) WITH (fillfactor = 50);

-- Where tasks of a key wait, and under which limit.
CREATE TABLE limit_gates (
  key_id    bigint NOT NULL,
  lane_id   integer NOT NULL,
  key_limit integer NOT NULL,
  PRIMARY KEY (key_id, lane_id, key_limit)
);

-- A ready task with a key is parked unless it is one of the first of its gate that the limit has room for, so that those who
-- look for work meet no task that they may not have, however many wait. counted: its node says what it has to give.
ALTER TABLE open_tasks ADD COLUMN key_id bigint;
ALTER TABLE open_tasks ADD COLUMN key_limit integer;
ALTER TABLE open_tasks ADD COLUMN parked boolean NOT NULL DEFAULT false;
ALTER TABLE open_tasks ADD COLUMN counted boolean NOT NULL DEFAULT false;

DROP INDEX open_tasks_ready;
CREATE INDEX open_tasks_ready ON open_tasks (lane_id, rank, job_seq, no) WHERE state = 'ready' AND NOT parked;
CREATE INDEX open_tasks_gated ON open_tasks (key_id, lane_id, key_limit, rank, job_seq, no)
  WHERE state = 'ready' AND key_id IS NOT NULL;
