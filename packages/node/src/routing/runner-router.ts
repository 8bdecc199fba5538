/**
 * Which plugin builds a task: the first one registered that supports its kind and has the labels its selector asks for.
 *
 * Registration order is the only tie-break. A task without a selector goes to runners with and without labels alike; its own labels
 * play no part. When the chosen runner cannot build the task no other is asked: its answer is the answer.
 */
import { describeError, type Logger } from '@millrace/runner';
import { checkTaskSpec, selectorMatches, type Labels, type TaskSpec } from '@millrace/runner/model';
import { RunnerError, makeRunId, type BuiltTask, type RunnerPlugin } from '@millrace/runner/plugin';
import { BuildContext } from './build-context.ts';

interface Entry {
  readonly runner: RunnerPlugin;
  readonly labels: Labels;
}

/** Of a runner's name; with a slot, a number and the dashes it is within the length of a task id. */
const MAX_NAME_LENGTH = 128;

export class RunnerRouter {
  readonly #entries: Entry[] = [];
  readonly #log: Logger | null;
  #context = new BuildContext();

  constructor(options: { readonly log?: Logger } = {}) {
    this.#log = options.log ?? null;
  }

  /** Lends `context` to all runners, whenever they were registered. */
  withContext(context: BuildContext): this {
    this.#context = context;
    return this;
  }

  /** As {@link registerWithLabels}, without any. */
  register(runner: RunnerPlugin): this {
    return this.registerWithLabels(runner, {});
  }

  /**
   * Adds a runner after those there are.
   *
   * @throws RunnerError `DuplicateRunner` when one of its name is there, `InvalidSpec` for a name that cannot be part of a run id
   */
  registerWithLabels(runner: RunnerPlugin, labels: Labels): this {
    const { name } = runner;
    if (!/^[A-Za-z0-9._-]+$/.test(name) || name.length > MAX_NAME_LENGTH) {
      throw RunnerError.invalidSpec(
        `runner name ${JSON.stringify(name)} must be 1 to ${MAX_NAME_LENGTH} letters, digits, ".", "_" or "-"`,
      );
    }
    if (this.#entries.some((entry) => entry.runner.name === name)) throw RunnerError.duplicateRunner(name);
    this.#entries.push({ runner, labels: { ...labels } });
    return this;
  }

  /** The runner for a task; null: none. */
  pick(spec: TaskSpec): RunnerPlugin | null {
    const [first, ...others] = this.#entries.filter((entry) => fits(entry, spec));
    if (others.length > 0) {
      this.#log?.debug('several runners fit, the first registered has the task', {
        runner: first!.runner.name,
        others: others.map((entry) => entry.runner.name),
        kind: spec.kind.type,
      });
    }
    return first?.runner ?? null;
  }

  /**
   * The task, ready to run.
   *
   * @throws RunnerError `NoRunner` for an embedded task before any runner is asked, and when no runner fits, saying whether kind or
   * labels are missing; whatever the chosen runner throws; MillraceError `invalid_argument` for a spec that breaks a rule of
   * the model
   */
  build(spec: TaskSpec): BuiltTask {
    if (spec.kind.type === 'embedded') {
      throw RunnerError.noRunner(
        'TaskKind::Embedded is not built by runners; use submit_with_task() and supply the executable task',
      );
    }
    checkTaskSpec(spec);
    const runner = this.pick(spec);
    if (runner === null) {
      const able = this.#entries
        .filter((entry) => entry.runner.supports(spec))
        .map(({ runner: { name } }) => name);
      throw RunnerError.noRunner(
        able.length === 0
          ? `${spec.kind.type} (no runner supports the kind)`
          : `${spec.kind.type} (none of ${able.join(', ')} has the labels its selector asks for)`,
      );
    }
    // Before the build, which may fail: the number is used up all the same.
    const runId = runner.buildRunId?.(spec.slot) ?? makeRunId(runner.name, spec.slot);
    try {
      return runner.buildTask(spec, this.#context, runId);
    } catch (error) {
      this.#log?.debug('a runner refused a task', { run_id: runId.name, error: describeError(error) });
      throw error;
    }
  }

  /** Whether a runner is registered with exactly this label. */
  containsLabel(key: string, value: string): boolean {
    return this.#entries.some(({ labels }) => Object.hasOwn(labels, key) && labels[key] === value);
  }
}

function fits({ runner, labels }: Entry, spec: TaskSpec): boolean {
  return (
    runner.supports(spec) && (spec.runnerSelector === null || selectorMatches(spec.runnerSelector, labels))
  );
}
