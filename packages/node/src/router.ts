/** Which runner gets a task: exact capability, then labels, then registration order. */
import {
  MillraceError,
  checkCapability,
  describeError,
  type Json,
  type Logger,
  type Runner,
  type TaskSpec,
} from '@millrace/runner';

/** A runner and what it asks of the node, in registration order. */
export interface RunnerRegistration {
  readonly runner: Runner;
  /** Labels this runner stands for; added to the node's own when tasks are matched. */
  readonly labels?: Readonly<Record<string, string>>;
}

interface Route {
  readonly runner: Runner;
  readonly labels: Readonly<Record<string, string>>;
}

export class RunnerRouter {
  readonly #routes: readonly Route[];
  /** Sorted by bytes, each once: what the node registers with. */
  readonly capabilities: readonly string[];
  /** The node's own labels and those of all runners; where they disagree, the node's, then the first runner's. */
  readonly labels: Readonly<Record<string, string>>;
  #closing: Promise<void> | null = null;

  /** @throws MillraceError `invalid_argument` when there is no runner or one has a capability that is none. */
  constructor(
    registrations: readonly (Runner | RunnerRegistration)[],
    nodeLabels: Readonly<Record<string, string>> = {},
  ) {
    if (registrations.length === 0) {
      throw new MillraceError('invalid_argument', 'no runners registered: give the node at least one runner');
    }
    this.#routes = registrations.map((entry) => {
      const { runner, labels } = 'runner' in entry ? entry : { runner: entry, labels: undefined };
      checkCapability(runner.capability);
      return { runner, labels: { ...nodeLabels, ...labels } };
    });
    this.capabilities = [...new Set(this.#routes.map((route) => route.runner.capability))].toSorted((a, b) =>
      Buffer.compare(Buffer.from(a), Buffer.from(b)),
    );
    this.labels = Object.assign({}, ...this.#routes.map((route) => route.labels).toReversed(), nodeLabels);
  }

  /**
   * The runner for a task: of those with its capability, the first whose labels have every value of
   * `capability_filters`. The dispatcher has matched the filters already, by rules of its own; so when none fits, the
   * first with the capability does it. Null: no runner has the capability.
   */
  pick(task: Pick<TaskSpec, 'capability' | 'capability_filters'>): Runner | null {
    const able = this.#routes.filter((route) => route.runner.capability === task.capability);
    const fitting = able.find((route) => satisfies(route.labels, task.capability_filters));
    return (fitting ?? able[0])?.runner ?? null;
  }

  /** Closes every runner, each once, all at the same time. Idempotent; never rejects: what fails is logged. */
  close(log: Logger): Promise<void> {
    const close = async (runner: Runner): Promise<void> => {
      try {
        await runner.close?.();
      } catch (error) {
        log.error('runner could not be closed', {
          capability: runner.capability,
          error: describeError(error),
        });
      }
    };
    const runners = [...new Set(this.#routes.map((route) => route.runner))];
    this.#closing ??= Promise.all(runners.map(close)).then(() => undefined);
    return this.#closing;
  }
}

function satisfies(labels: Readonly<Record<string, string>>, filters: Json): boolean {
  if (typeof filters !== 'object' || filters === null || Array.isArray(filters)) return true;
  return Object.entries(filters).every(
    ([name, value]) => Object.hasOwn(labels, name) && labels[name] === value,
  );
}
