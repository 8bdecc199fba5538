/**
 * Doing again what a job left undone. A job that has ended stays as it is, so this is a new job: the tasks that failed or were
 * cancelled, with fresh attempts, and in place of what completed its outputs. Pure.
 *
 * What a task took from an earlier stage (`stage:` inputs) it gets from there again: as data ids from the tasks that completed,
 * and by reference from those that are done again. Where there are some of both, the reference may match nothing (`stage?:`),
 * since the ids alone would have been enough.
 */
import { MillraceError } from '@millrace/runner';
import { JOB_LIMITS, parseStageReference } from './job-spec.ts';
import { isFinal } from './lifecycle.ts';
import type { JobDetail, JobSpec, TaskRecord, TaskSubmission } from './records.ts';
import { StageOutputs } from './stores/stage-inputs.ts';

/**
 * The job that does again what `detail` left undone. Deadlines that have passed by `nowMs` and times to wait for are left out.
 * `submitted` is the job as the store has it from its submission, tasks in the same order.
 *
 * @throws MillraceError `failed_precondition` when the job has not ended or completed, or an input cannot be found again
 */
export function redriveSpec(detail: JobDetail, submitted: JobSpec, nowMs: number): JobSpec {
  const { job, tasks } = detail;
  if (!isFinal(job.status)) {
    throw new MillraceError(
      'failed_precondition',
      `job ${job.id} is ${job.status}; only a job that has ended can be redriven, cancel it first`,
    );
  }
  if (job.status === 'completed') {
    throw new MillraceError('failed_precondition', `job ${job.id} is completed; there is nothing to redrive`);
  }
  const pairs = tasks.map((record, index) => ({ record, task: taskAt(submitted, index) }));
  const undone = pairs.filter(({ record }) => record.status !== 'completed');
  const stages = new Set(pairs.map(({ task }) => task.stage));
  const left = new Set(undone.map(({ task }) => task.stage));
  const outputs = new OutputsByStage(detail);
  const deadline = (at: string | null): string | null => (at !== null && Date.parse(at) > nowMs ? at : null);
  const inputsOf = ({ inputs_cids }: TaskSubmission, record: TaskRecord): string[] => {
    const inputs = inputs_cids.flatMap((input) => {
      const reference = parseStageReference(input, (name) => stages.has(name));
      if (reference === null) return [input];
      const ids = outputs.of(reference.stage).select(reference.glob);
      if (left.has(reference.stage)) return ids.length > 0 ? [...ids, optional(input)] : [input];
      if (ids.length > 0 || reference.optional) return ids;
      throw new MillraceError(
        'failed_precondition',
        `job ${job.id} cannot be redriven: input ${input} of task ${record.label} (${record.id}) matches no output of stage ${reference.stage}, which is complete`,
      );
    });
    if (inputs.length > JOB_LIMITS.inputsPerTask) {
      throw new MillraceError(
        'failed_precondition',
        `job ${job.id} cannot be redriven: task ${record.label} (${record.id}) would have ${inputs.length} inputs; a task may have ${JOB_LIMITS.inputsPerTask}`,
      );
    }
    return inputs;
  };
  return {
    label: submitted.label,
    domain_id: submitted.domain_id,
    priority: submitted.priority,
    meta: submitted.meta,
    deadline_at: deadline(submitted.deadline_at),
    tasks: undone.map(({ record, task }) => ({
      ...withoutWait(task),
      inputs_cids: inputsOf(task, record),
      deadline_at: deadline(task.deadline_at),
    })),
    // A stage that is complete has nothing undone before it, so no path is cut.
    edges: submitted.edges.filter(({ from, to }) => left.has(from) && left.has(to)),
    ...(submitted.cache === true && { cache: true }),
    redrive_of: job.id,
  };
}

/** The outputs of the completed tasks of each stage. */
class OutputsByStage {
  readonly #detail: JobDetail;
  readonly #known = new Map<string, StageOutputs>();
  #metas: ReadonlyMap<string, JobDetail['receipts'][number]['meta']> | null = null;

  constructor(detail: JobDetail) {
    this.#detail = detail;
  }

  of(stage: string): StageOutputs {
    let known = this.#known.get(stage);
    if (known === undefined) {
      const { tasks, receipts } = this.#detail;
      this.#metas ??= new Map(
        receipts.filter(({ outcome }) => outcome === 'completed').map(({ task_id, meta }) => [task_id, meta]),
      );
      const completed = tasks.filter((task) => task.stage === stage && task.status === 'completed');
      known = new StageOutputs(
        completed.map(({ id, outputs_prefix, output_cids }) => ({
          outputsPrefix: outputs_prefix,
          outputs: output_cids,
          meta: this.#metas?.get(id) ?? null,
        })),
      );
      this.#known.set(stage, known);
    }
    return known;
  }
}

function taskAt({ tasks }: JobSpec, index: number): TaskSubmission {
  const task = tasks[index];
  if (task === undefined) throw new MillraceError('internal', `the job was submitted without task ${index}`);
  return task;
}

function withoutWait(task: TaskSubmission): TaskSubmission {
  const copy: Omit<TaskSubmission, 'not_before'> & { not_before?: string } = { ...task };
  delete copy.not_before;
  return copy;
}

/** `stage:x` as `stage?:x`. */
function optional(input: string): string {
  return input.replace(/^stage:/, 'stage?:');
}
