/**
 * A task as a runner gets it: what it is, which lane it belongs to, when it runs again. Not the `TaskSpec` of a lease, which is
 * the wire's and is mapped to this one (`docs/routing.md`).
 */
import { absent, counter, object, optional, string } from '../decode.ts';
import type { JsonObject } from '../json.ts';
import { invalidModel } from './errors.ts';
import { checkSlot, type Slot } from './identity.ts';
import {
  DEFAULT_BACKOFF,
  backoffToJson,
  checkBackoff,
  parseAdmission,
  parseBackoff,
  parseRestart,
  restartToJson,
  type AdmissionPolicy,
  type BackoffPolicy,
  type RestartPolicy,
} from './policies.ts';
import {
  checkSelector,
  labelsToJson,
  parseLabels,
  parseSelector,
  selectorToJson,
  type Labels,
  type RunnerSelector,
} from './selector.ts';
import { checkTaskKind, parseTaskKind, taskKindToJson, type TaskKind } from './task-kind.ts';

export interface TaskSpec {
  readonly slot: Slot;
  readonly kind: TaskKind;
  /** Of one attempt. `timeout` in JSON. */
  readonly timeoutMs: number;
  readonly restart: RestartPolicy;
  readonly backoff: BackoffPolicy;
  readonly admission: AdmissionPolicy;
  /** Null: any runner. */
  readonly runnerSelector: RunnerSelector | null;
  /** Notes; they play no part in routing. */
  readonly labels: Labels;
  /** Attempts after the first one of a streak of failures. Null and 0: without limit. */
  readonly maxRetries: number | null;
}

/**
 * A spec with the defaults of what is not given: never restarted, the default backoff, `dropIfRunning`, any runner, no
 * labels, retries without limit.
 *
 * @throws MillraceError `invalid_argument` as {@link checkTaskSpec}
 */
export function taskSpec(given: Pick<TaskSpec, 'slot' | 'kind' | 'timeoutMs'> & Partial<TaskSpec>): TaskSpec {
  const spec: TaskSpec = {
    restart: { type: 'never' },
    backoff: DEFAULT_BACKOFF,
    admission: 'dropIfRunning',
    runnerSelector: null,
    labels: {},
    maxRetries: null,
    ...given,
  };
  checkTaskSpec(spec);
  return spec;
}

/** The rules of structure. @throws MillraceError `invalid_argument`, naming the member and the rule */
export function checkTaskSpec(spec: TaskSpec, path = 'spec'): void {
  checkSlot(spec.slot, `${path}.slot`);
  if (!(spec.timeoutMs > 0)) throw invalidModel(`${path}.timeout`, 'timeout must be greater than zero');
  checkTaskKind(spec.kind, `${path}.kind`);
  checkBackoff(spec.backoff, `${path}.backoff`);
  if (spec.runnerSelector !== null) checkSelector(spec.runnerSelector, `${path}.runnerSelector`);
}

/**
 * Whether a spec may be handed to a router: {@link checkTaskSpec}, and it is not embedded.
 *
 * @throws MillraceError `invalid_argument`
 */
export function validateForSubmit(spec: TaskSpec): void {
  checkTaskSpec(spec);
  if (spec.kind.type !== 'embedded') return;
  throw invalidModel(
    'spec.kind',
    'TaskKind::Embedded cannot be routed to a runner; use submit_with_task: its owner supplies the executable task',
  );
}

/**
 * Reads the JSON form. `slot`, `kind`, `timeout`, `restart`, `backoff` and `admission` must be there. Unknown members are
 * ignored.
 *
 * @throws MillraceError `invalid_argument` for another shape, and as {@link checkTaskSpec}
 */
export function parseTaskSpec(value: unknown, path = 'spec'): TaskSpec {
  const raw = object(value, path);
  const spec: TaskSpec = {
    slot: string(raw['slot'], `${path}.slot`),
    kind: parseTaskKind(raw['kind'], `${path}.kind`),
    timeoutMs: counter(raw['timeout'], `${path}.timeout`),
    restart: parseRestart(raw['restart'], `${path}.restart`),
    backoff: parseBackoff(raw['backoff'], `${path}.backoff`),
    admission: parseAdmission(raw['admission'], `${path}.admission`),
    runnerSelector: optional(parseSelector)(raw['runnerSelector'], `${path}.runnerSelector`),
    labels: absent(parseLabels, () => ({}))(raw['labels'], `${path}.labels`),
    maxRetries: optional(counter)(raw['maxRetries'], `${path}.maxRetries`),
  };
  checkTaskSpec(spec, path);
  return spec;
}

/** The JSON form: what {@link parseTaskSpec} reads back to an equal spec. */
export function taskSpecToJson(spec: TaskSpec): JsonObject {
  return {
    slot: spec.slot,
    kind: taskKindToJson(spec.kind),
    timeout: spec.timeoutMs,
    restart: restartToJson(spec.restart),
    backoff: backoffToJson(spec.backoff),
    admission: spec.admission,
    ...(spec.runnerSelector !== null && { runnerSelector: selectorToJson(spec.runnerSelector) }),
    ...(Object.keys(spec.labels).length > 0 && { labels: labelsToJson(spec.labels) }),
    ...(spec.maxRetries !== null && { maxRetries: spec.maxRetries }),
  };
}
