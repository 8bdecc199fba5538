/** Stages: what completes them, what that makes runnable, and what the tasks of a later stage get from an earlier one. */
import { JOB_LIMITS, isStageReference, parseStageReference } from '../job-spec.ts';
import type { Ledger } from './sqlite-ledger.ts';
import type { Job, Stage, Task } from './sqlite-model.ts';
import { StageOutputs } from './stage-inputs.ts';
import type { StageOutput } from './stage-inputs.ts';

/** Ids that the `stage:` inputs of one stage may come to in all. */
const MAX_RESOLVED_PER_STAGE = 1_000_000;

/** How a task fails whose inputs cannot be resolved, and with it its job. */
export interface Failing {
  fail(task: Task, job: Job, reason: string): void;
  /** Ends what is left of the job. */
  endRest(job: Job, reason: string): void;
}

/** Hears which tasks of a job became ready. */
export type OnOpen = (job: Job, tasks: readonly number[]) => void;

export class Stages {
  readonly #ledger: Ledger;
  readonly #failing: Failing;
  readonly #onOpen: OnOpen;

  constructor(ledger: Ledger, failing: Failing, onOpen: OnOpen) {
    this.#ledger = ledger;
    this.#failing = failing;
    this.#onOpen = onOpen;
  }

  /** One task of the stage completed. The stages after it may become runnable. */
  count(job: Job, no: number): void {
    const ledger = this.#ledger;
    const stage = ledger.stage(job, no);
    stage.remaining -= 1;
    if (stage.remaining > 0) return;
    for (const next of ledger.stagesAfter(job, no)) {
      const after = ledger.stage(job, next);
      if (after.depsRemaining === 1) this.#open(job, after);
      else after.depsRemaining -= 1;
    }
  }

  /** Makes a stage's tasks ready, with their `stage:` inputs resolved. */
  #open(job: Job, stage: Stage): void {
    const ledger = this.#ledger;
    ledger.flushRows();
    const waiting = ledger
      .tasksOf(job, stage.firstTask, stage.lastTask)
      .filter(({ spec, state }) => spec.stage === stage.no && state === 'blocked');
    // From here on a task of it without a row is ready; one that waits for its time gets a row.
    stage.depsRemaining = 0;
    stage.openedAt = ledger.now;
    const outputs = new Map<string, StageOutputs>();
    const isStage = (name: string): boolean => ledger.stageNamed(job, name) !== null;
    const opened: number[] = [];
    let resolved = 0;
    let failure: string | null = null;
    for (const task of waiting) {
      const { seq, spec } = task;
      if (spec.inputs.some(isStageReference)) {
        const room = MAX_RESOLVED_PER_STAGE - resolved;
        const answer = this.#resolve(job, spec.inputs, isStage, outputs, room);
        if (typeof answer === 'string') {
          this.#failing.fail(task, job, answer);
          failure ??= `task ${ledger.nameOf(task)} failed: ${answer}`;
          continue;
        }
        resolved += answer.length;
        ledger.specs.resolve(seq, answer);
      }
      if (spec.notBefore !== null && spec.notBefore > ledger.now) {
        ledger.move(task, job, 'delayed');
        ledger.save(task);
        continue;
      }
      ledger.move(task, job, 'ready');
      ledger.emit(job, 'task.runnable', seq);
      ledger.enqueue(job, spec, seq, true);
      opened.push(seq);
    }
    if (failure !== null) this.#failing.endRest(job, failure);
    else this.#onOpen(job, opened);
  }

  /** The inputs with every `stage:` reference replaced, or why that is not possible. */
  #resolve(
    job: Job,
    inputs: readonly string[],
    isStage: (name: string) => boolean,
    outputs: Map<string, StageOutputs>,
    room: number,
  ): string[] | string {
    const ids: string[] = [];
    for (const input of inputs) {
      const reference = parseStageReference(input, isStage);
      if (!reference) {
        ids.push(input);
        continue;
      }
      let source = outputs.get(reference.stage);
      if (!source) {
        source = new StageOutputs(this.#outputs(job, reference.stage));
        outputs.set(reference.stage, source);
      }
      const found = source.select(reference.glob);
      if (found.length === 0 && !reference.optional)
        return `input ${input} matches no output of stage ${reference.stage}`;
      if (ids.length + found.length > JOB_LIMITS.inputsPerTask) {
        return `input ${input} brings the inputs to ${ids.length + found.length}; a task may have ${JOB_LIMITS.inputsPerTask}`;
      }
      if (ids.length + found.length > room) {
        return `input ${input} brings the inputs of the stage beyond ${MAX_RESOLVED_PER_STAGE} in all`;
      }
      for (const id of found) ids.push(id);
    }
    return ids;
  }

  /** In the order of the tasks. */
  #outputs(job: Job, name: string): StageOutput[] {
    const ledger = this.#ledger;
    const stage = ledger.stageNamed(job, name);
    if (!stage) return [];
    const tasks = ledger
      .tasksOf(job, stage.firstTask, stage.lastTask)
      .filter(({ spec, state }) => spec.stage === stage.no && state === 'completed');
    const completions = new Map(
      ledger.receipts
        .ofRows(job, new Set(tasks.map(({ ending }) => ending)))
        .filter(({ outcome }) => outcome === 'completed')
        .map((attempt) => [job.firstTask + attempt.index, attempt]),
    );
    return tasks.flatMap(({ seq, spec }) => {
      const completion = completions.get(seq);
      if (!completion) return [];
      return [{ outputsPrefix: spec.outputsPrefix, outputs: completion.outputs, meta: completion.meta }];
    });
  }
}
