-- What a job made, so that it can go with the job.
CREATE INDEX data_job ON data (job_id) WHERE job_id IS NOT NULL;

-- Tasks that failed for good.
CREATE INDEX ended_tasks_failed ON ended_tasks (job_seq, no) WHERE state = 'failed';

-- job_seq does again what the job source_id left undone.
CREATE TABLE redrives (
  source_id text COLLATE "C" NOT NULL,
  job_seq   bigint NOT NULL,
  PRIMARY KEY (source_id, job_seq)
);
CREATE INDEX redrives_job ON redrives (job_seq);

-- Jobs that are submitted at set times. body is JSON: what does not change. A due tick is claimed for a while by the dispatcher
-- that submits it; a revision is never used again, so that a schedule that took another's name submits jobs of its own.
CREATE TABLE schedules (
  domain_id     text COLLATE "C" NOT NULL,
  name          text COLLATE "C" NOT NULL,
  revision      text COLLATE "C" NOT NULL UNIQUE,
  body          text NOT NULL,
  created_at    bigint NOT NULL,
  next_at       bigint,
  claimed_until bigint,
  last_tick_at  bigint,
  last_outcome  text,
  last_job_id   text,
  PRIMARY KEY (domain_id, name)
);
CREATE INDEX schedules_next ON schedules (next_at) WHERE next_at IS NOT NULL;
