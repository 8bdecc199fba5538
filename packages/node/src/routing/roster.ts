/**
 * The runners of a node: from a leased task to something that can be run.
 *
 * A Runner that is registered for a capability performs it itself: to the model its tasks are *embedded*, and this is their
 * owner. A runner that has a plugin ({@link KindRunner}) says what kind a task is, and the task goes through the
 * {@link RunnerRouter}, whose entry for it has the label `millrace.capability` with its capability. So a capability stays what it is on the
 * wire, an exact name, and `capability_filters` are the rest of the selector.
 */
import {
  MillraceError,
  checkCapability,
  describeError,
  type Json,
  type Logger,
  type Runner,
  type RunnerHost,
  type RunnerType,
  type TaskContext,
  type TaskSpec as LeasedTask,
} from '@millrace/runner';
import {
  selectorFromFilters,
  selectorMatches,
  taskSpec,
  type Labels,
  type RunnerSelector,
  type TaskKind,
  type TaskSpec,
} from '@millrace/runner/model';
import {
  RunnerError,
  isKindRunner,
  makeRunId,
  nameOfCapability,
  type BuiltTask,
} from '@millrace/runner/plugin';
import { SupervisionBounds, type Supervision, type SupervisionOptions } from '../supervision/policy.ts';
import { Slots } from '../supervision/slots.ts';
import { BuildContext } from './build-context.ts';
import { RunnerRouter } from './runner-router.ts';

/** A runner and what it asks of the node, in registration order. */
export interface RunnerRegistration {
  readonly runner: Runner;
  /** Labels this runner stands for; added to the node's own when tasks are matched. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Bounds of its tasks' supervision. Default: the node's. */
  readonly supervision?: SupervisionOptions;
}

export interface RosterOptions {
  readonly labels?: Readonly<Record<string, string>>;
  readonly supervision?: SupervisionOptions;
  /** Lent to runners with a plugin. */
  readonly context?: BuildContext;
  readonly log?: Logger;
}

/** Every entry of a node's router has it, with the capability it was registered for. */
export const CAPABILITY_LABEL = 'millrace.capability';

/** A runner that has a capability. Opaque: for {@link Roster.prepare}. */
export interface Route {
  readonly runner: Runner;
  readonly type: RunnerType;
  readonly labels: Labels;
  readonly bounds: SupervisionBounds;
  /** In run ids. */
  readonly name: string;
}

/** A task of a lease, ready to be supervised. */
export interface PreparedTask {
  readonly task: BuiltTask;
  readonly supervision: Supervision;
}

export class Roster {
  /** Of this node, for all runners. */
  readonly slots = new Slots();
  /** Sorted by bytes, each once: what the node registers with. */
  readonly capabilities: readonly string[];
  /** The node's own labels and those of all runners; where they disagree, the node's, then the first runner's. */
  readonly labels: Labels;
  readonly #routes = new Map<string, Route[]>();
  readonly #router: RunnerRouter;
  #closing: Promise<void> | null = null;

  /**
   * @throws MillraceError `invalid_argument` when there is no runner, one has a capability that is none, or bounds that make no sense;
   * RunnerError `DuplicateRunner` for two plugins of one name
   */
  constructor(registrations: readonly (Runner | RunnerRegistration)[], options: RosterOptions = {}) {
    if (registrations.length === 0) {
      throw new MillraceError('invalid_argument', 'no runners registered: give the node at least one runner');
    }
    const nodeLabels = options.labels ?? {};
    const nodeBounds = new SupervisionBounds(options.supervision);
    this.#router = new RunnerRouter(options).withContext(options.context ?? new BuildContext());
    const routes = registrations.map((entry): Route => {
      const { runner, labels, supervision } = 'runner' in entry ? entry : { runner: entry };
      const { capability } = runner;
      checkCapability(capability);
      return {
        runner,
        type: runner.type ?? 'embedded',
        labels: { ...nodeLabels, ...labels },
        bounds:
          supervision === undefined
            ? nodeBounds
            : new SupervisionBounds(
                { ...options.supervision, ...supervision },
                `supervision of ${capability}`,
              ),
        name: isKindRunner(runner) ? runner.plugin.name : nameOfCapability(capability),
      };
    });
    for (const route of routes) {
      const { runner, labels } = route;
      const { capability } = runner;
      if (isKindRunner(runner)) {
        this.#router.registerWithLabels(runner.plugin, { ...labels, [CAPABILITY_LABEL]: capability });
      }
      const same = this.#routes.get(capability);
      if (same === undefined) this.#routes.set(capability, [route]);
      else same.push(route);
    }
    this.capabilities = [...this.#routes.keys()].toSorted((a, b) =>
      Buffer.compare(Buffer.from(a), Buffer.from(b)),
    );
    this.labels = Object.assign({}, ...routes.map((route) => route.labels).toReversed(), nodeLabels);
  }

  /**
   * The runner for a task: of those with its capability, the first whose labels have all that `capability_filters` asks
   * for. The dispatcher has matched the filters already, by rules of its own; so when none fits, the first with the
   * capability does it. Null: no runner has the capability.
   */
  pick(task: Pick<LeasedTask, 'capability' | 'capability_filters'>): Route | null {
    const able = this.#routes.get(task.capability);
    if (able === undefined) return null;
    // With one, the filters could change nothing.
    const selector = able.length === 1 ? null : readFilters(task.capability_filters);
    const fitting = selector && able.find((route) => selectorMatches(selector, route.labels));
    return fitting ?? able[0] ?? null;
  }

  /**
   * What is to be run for a task, and how it is supervised. `attemptMs` is the longest an attempt may take.
   *
   * @throws MillraceError, RunnerError when the task asks for something this node does not do; nothing has been started
   */
  prepare(route: Route, task: LeasedTask, attemptMs: number): PreparedTask {
    const supervision = route.bounds.of(task.meta);
    const { runner } = route;
    if (isKindRunner(runner)) {
      const kind = RunnerError.specified(() => runner.kindOf(task));
      const spec = specOf(route, kind, task, supervision, attemptMs);
      return { task: this.#router.build(spec), supervision };
    }
    const { name } = makeRunId(route.name, supervision.lane ?? task.id);
    return { task: { name, run: (ctx: TaskContext) => runner.run(ctx) }, supervision };
  }

  /** Tells every runner that the node starts, each once, all at the same time. Never rejects: what fails is logged. */
  async nodeStarts(host: RunnerHost): Promise<void> {
    const tell = async (runner: Runner): Promise<void> => {
      try {
        await runner.onNodeStart?.(host);
      } catch (error) {
        if (host.signal.aborted) return;
        host.log.warn('a runner is not ready yet; its tasks will try again', {
          capability: runner.capability,
          error: describeError(error),
        });
      }
    };
    await Promise.all([...this.#runners()].map(tell));
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
    this.#closing ??= Promise.all([...this.#runners()].map(close)).then(() => undefined);
    return this.#closing;
  }

  #runners(): Set<Runner> {
    return new Set([...this.#routes.values()].flat().map((route) => route.runner));
  }
}

function specOf(
  route: Route,
  kind: TaskKind,
  task: LeasedTask,
  supervision: Supervision,
  attemptMs: number,
): TaskSpec {
  const filters = readFilters(task.capability_filters);
  const asked = filters !== null && selectorMatches(filters, route.labels) ? filters : null;
  return taskSpec({
    slot: supervision.lane ?? task.id,
    kind,
    timeoutMs: supervision.timeoutMs ?? attemptMs,
    restart: supervision.restart,
    backoff: supervision.backoff,
    admission: supervision.admission,
    maxRetries: supervision.maxRetries,
    runnerSelector: {
      matchLabels: { ...asked?.matchLabels, [CAPABILITY_LABEL]: task.capability },
      matchExpressions: asked?.matchExpressions ?? [],
    },
  });
}

/** Null: they are none of ours, and only the dispatcher that wrote them knows what they mean. */
function readFilters(filters: Json): RunnerSelector | null {
  try {
    return selectorFromFilters(filters);
  } catch {
    return null;
  }
}
