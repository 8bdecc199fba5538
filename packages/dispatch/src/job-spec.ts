/**
 * The one place where a submitted job is read: unknown bytes in, a {@link JobSpec} with every default filled in out.
 * Everything past this file trusts its types.
 *
 * Unknown members are ignored, absent and `null` are the same for optional members. All problems are reported at once.
 */
import { MillraceError, checkCapability } from '@millrace/runner';
import { selectorFromFilters } from '@millrace/runner/model';
import type { Json, JsonObject } from '@millrace/runner';
import { z } from 'zod';
import type { CapabilityFilters, ConcurrencyLimit, JobSpec, TaskSubmission } from './records.ts';
import { parseResources } from './resources.ts';
import type { Resources } from './resources.ts';

/** Bounds of one job. Lengths are bytes of UTF-8. */
export const JOB_LIMITS = {
  /** Labels and stage names. */
  nameBytes: 256,
  /** Entries of `capability_filters`; its keys and values are bound by `nameBytes`. */
  filters: 32,
  /** Values of one `In` or `NotIn`. */
  filterValues: 32,
  /** Inputs of one task, `stage:` references resolved. */
  inputsPerTask: 10_000,
  /** Inputs of all tasks as submitted. */
  inputsPerJob: 1_000_000,
  inputBytes: 2048,
  /** The pattern of a `stage:<stage>/<glob>` input. */
  globBytes: 256,
  /** Runs of `*` in such a pattern: the time of a match grows with a power of their number. */
  globStars: 6,
  prefixBytes: 1024,
  edges: 100_000,
  maxAttempts: 100,
  /** Characters of the key of a concurrency limit, and the largest limit. */
  keyLength: 256,
  maxConcurrency: 1_000_000,
  /** The spec as JSON, defaults included. */
  totalBytes: 64 * 1024 * 1024,
  /** Nesting of `meta`. */
  metaDepth: 64,
  /** Problems reported at once. */
  problems: 20,
} as const;

export interface JobSpecOptions {
  /** For jobs without `domain_id`. */
  readonly defaultDomainId: string;
  /** Tasks per job. */
  readonly maxTasks: number;
  /** Epoch ms: deadlines must lie after it. */
  readonly now: number;
}

/**
 * @throws MillraceError `invalid_argument` with up to 20 problems, each naming the path, the rule and the value.
 */
export function parseJobSpec(value: unknown, options: JobSpecOptions): JobSpec {
  const parsed = schemaFor(options).safeParse(value, { reportInput: true });
  if (!parsed.success) {
    throw refusal(
      parsed.error.issues.map((issue) => {
        const at = issue.path
          .map((key) => (typeof key === 'number' ? `[${key}]` : `.${String(key)}`))
          .join('');
        return problem(`job${at}`, issue.message, issue.input);
      }),
    );
  }
  const body = parsed.data;
  const spec: JobSpec = {
    label: body.label ?? 'job',
    domain_id: body.domain_id ?? options.defaultDomainId,
    priority: body.priority ?? 0,
    meta: (body.meta ?? {}) as JsonObject,
    deadline_at: body.deadline_at ?? null,
    tasks: body.tasks.map((task, index): TaskSubmission => {
      const label = task.label ?? `task-${index + 1}`;
      return {
        label,
        stage: task.stage ?? label,
        capability: task.capability,
        capability_filters: task.capability_filters ?? {},
        // Inherited, so that a job's priority means something without repeating it for every task.
        priority: task.priority ?? body.priority ?? 0,
        inputs_cids: task.inputs_cids ?? [],
        outputs_prefix: task.outputs_prefix ?? null,
        mode: task.mode ?? 'public',
        meta: (task.meta ?? null) as Json,
        max_attempts: task.max_attempts ?? 3,
        deadline_at: task.deadline_at ?? null,
        ...(task.not_before && { not_before: task.not_before }),
        ...concurrencyOf(task.concurrency ?? body.concurrency),
        ...(task.resources && { resources: task.resources }),
      };
    }),
    edges: distinctEdges(body.edges ?? []),
    // Left out, so that the spec of any other job, and its hash, is as it always was.
    ...(body.cache === true && { cache: true }),
    ...(body.not_before && { not_before: body.not_before }),
  };
  const problems = [...timeProblems(spec), ...graphProblems(spec)];
  if (problems.length > 0) throw refusal(problems);
  // Rendering the job only to measure it was a third of this function's time; few jobs can come near the limit.
  const bytes = mostBytes(spec) > JOB_LIMITS.totalBytes ? Buffer.byteLength(JSON.stringify(spec)) : 0;
  if (bytes > JOB_LIMITS.totalBytes) {
    throw refusal([
      `job must be at most ${JOB_LIMITS.totalBytes} bytes of JSON, got ${bytes}: store large values as data and name them in inputs_cids`,
    ]);
  }
  return spec;
}

/** Inherited like the priority: the key is of the domain, so tasks share it whether the job names it or each of them. */
function concurrencyOf(
  concurrency: ConcurrencyLimit | null | undefined,
): Pick<TaskSubmission, 'concurrency'> {
  if (concurrency == null) return {};
  const { key, limit } = concurrency;
  return { concurrency: { key, limit } };
}

/** A task that may not begin before it must have ended. */
function timeProblems(spec: JobSpec): string[] {
  const late = (at: string | null, notBefore: string | undefined): boolean =>
    at !== null && notBefore !== undefined && Date.parse(at) <= Date.parse(notBefore);
  const rule = 'must lie after not_before';
  if (late(spec.deadline_at, spec.not_before)) {
    return [problem('job.deadline_at', `${rule} (${spec.not_before})`, spec.deadline_at)];
  }
  return spec.tasks.flatMap(({ deadline_at: own, not_before: wait }, at) => {
    for (const [deadline, path] of [
      [own, `job.tasks[${at}].deadline_at`],
      [spec.deadline_at, 'job.deadline_at'],
    ] as const) {
      for (const [notBefore, whose] of [
        [wait, 'the task'],
        [spec.not_before, 'the job'],
      ] as const) {
        if (late(deadline, notBefore)) {
          return [
            problem(
              path,
              `${rule} of ${whose === 'the task' ? `task ${at}` : whose} (${notBefore})`,
              deadline,
            ),
          ];
        }
      }
    }
    return [];
  });
}

/** Member names, punctuation, numbers, times and ids of one task or of the job itself, generously. */
const BARE_BYTES = 512;

/** What one UTF-16 unit comes to at most: `\u` and four digits. */
const UNIT_BYTES = 6;

/** A bound on the spec's JSON that costs little to find. */
function mostBytes({ label, meta, tasks, edges }: JobSpec): number {
  let units = label.length + JSON.stringify(meta).length;
  for (const { from, to } of edges) units += from.length + to.length + '{"from":"","to":""},'.length;
  for (const task of tasks) {
    units += task.label.length + task.stage.length + task.capability.length;
    units += task.outputs_prefix?.length ?? 0;
    for (const input of task.inputs_cids) units += input.length + '"",'.length;
    for (const [key, value] of Object.entries(task.capability_filters)) {
      units += key.length + (typeof value === 'string' ? value : JSON.stringify(value)).length;
      units += '"":"",'.length;
    }
    if (task.meta !== null) units += JSON.stringify(task.meta).length;
    units += task.concurrency?.key.length ?? 0;
    if (task.resources !== undefined) units += JSON.stringify(task.resources).length;
  }
  return UNIT_BYTES * units + BARE_BYTES * (tasks.length + 1);
}

/** An input that names outputs of an earlier stage. */
export interface StageReference {
  readonly stage: string;
  /** null: all outputs. */
  readonly glob: string | null;
  /** No match is no failure. */
  readonly optional: boolean;
}

/** Whether an input is meant to name outputs of an earlier stage. */
export function isStageReference(input: string): boolean {
  return input.startsWith('stage') && /^stage\??:/.test(input);
}

/**
 * Reads `stage:<stage>` or `stage:<stage>/<glob>`, with `stage?:` instead when there may be no match. Stage names may contain slashes: the longest stage that fits is meant.
 * Null: not such an input. A `stage` that no name fits is returned up to the first slash.
 */
export function parseStageReference(
  input: string,
  isStage: (name: string) => boolean,
): StageReference | null {
  if (!isStageReference(input)) return null;
  const optional = input.startsWith('stage?');
  const rest = input.slice(input.indexOf(':') + 1);
  if (isStage(rest)) return { stage: rest, glob: null, optional };
  for (let slash = rest.lastIndexOf('/'); slash > 0; slash = rest.lastIndexOf('/', slash - 1)) {
    const stage = rest.slice(0, slash);
    if (isStage(stage)) return { stage, glob: rest.slice(slash + 1) || null, optional };
  }
  const slash = rest.indexOf('/');
  return slash === -1
    ? { stage: rest, glob: null, optional }
    : { stage: rest.slice(0, slash), glob: rest.slice(slash + 1) || null, optional };
}

// eslint-disable-next-line no-control-regex -- control characters are exactly what is refused; so are halves of characters, which no UTF-8 can hold
const UNPRINTABLE = /[\u0000-\u001f\u007f]|\p{Surrogate}/u;
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;
const RFC3339 = /^\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(?:\.\d+)?(?:[Zz]|[+-]\d{2}:\d{2})$/;

/** The newest schema, kept: to make one costs 3.5 ms, nearly all of what a small job cost. */
let kept: { readonly maxTasks: number; readonly schema: ReturnType<typeof makeSchema> } | null = null;
/** Epoch ms during the parsing under way, which is synchronous. */
let parsingAt = 0;

function schemaFor({ maxTasks, now }: JobSpecOptions): ReturnType<typeof makeSchema> {
  parsingAt = now;
  if (kept?.maxTasks !== maxTasks) kept = { maxTasks, schema: makeSchema(maxTasks) };
  return kept.schema;
}

function makeSchema(maxTasks: number) {
  const text = (maxBytes: number, minBytes = 1) => {
    const rule = `must be a string of ${minBytes} to ${maxBytes} bytes without control characters`;
    return z.string(rule).refine((value) => {
      const bytes = Buffer.byteLength(value);
      return bytes >= minBytes && bytes <= maxBytes && !UNPRINTABLE.test(value);
    }, rule);
  };
  const integer = (rule: string, min: number, max: number) =>
    z.number(rule).refine((value) => Number.isSafeInteger(value) && value >= min && value <= max, rule);
  const priority = integer(
    'must be an integer between -(2^53-1) and 2^53-1',
    Number.MIN_SAFE_INTEGER,
    Number.MAX_SAFE_INTEGER,
  ).nullish();
  const deadlineRule = 'must be an RFC 3339 time with Z or an offset';
  const deadline = z
    .string(deadlineRule)
    .refine((value) => RFC3339.test(value) && Number.isFinite(Date.parse(value.toUpperCase())), {
      error: deadlineRule,
      abort: true,
    })
    .refine((value) => Date.parse(value.toUpperCase()) > parsingAt, 'must lie in the future')
    .transform((value) => new Date(value.toUpperCase()).toISOString())
    .nullish();
  // One that has passed stays: a submission that is repeated must be the same.
  const notBefore = z
    .string(deadlineRule)
    .refine((value) => RFC3339.test(value) && Number.isFinite(Date.parse(value.toUpperCase())), deadlineRule)
    .transform((value) => new Date(value.toUpperCase()).toISOString())
    .nullish();
  const name = text(JOB_LIMITS.nameBytes);
  const metaRule = `must be JSON at most ${JOB_LIMITS.metaDepth} levels deep`;
  const filterRule = `must be a string of at most ${JOB_LIMITS.nameBytes} bytes without control characters, or an object of {"In": [1 to ${JOB_LIMITS.filterValues} such strings]}, {"NotIn": [the same]}, {"Exists": true} and {"DoesNotExist": true}`;
  const filterText = text(JOB_LIMITS.nameBytes, 0);
  const filter = z.custom<CapabilityFilters[string]>(
    (value) => isFilter(value, (entry) => filterText.safeParse(entry).success),
    filterRule,
  );
  const filtersRule = `must be an object of at most ${JOB_LIMITS.filters} members`;
  const inputsRule = `must be an array of at most ${JOB_LIMITS.inputsPerTask} data ids, URLs or stage:<stage>[/<glob>] references`;
  const keyRule = `must be a string of 1 to ${JOB_LIMITS.keyLength} characters, none of them a control character`;
  const concurrency = z
    .object(
      {
        key: z
          .string(keyRule)
          .refine(
            (value) =>
              value.length >= 1 &&
              value.length <= 2 * JOB_LIMITS.keyLength &&
              Array.from(value).length <= JOB_LIMITS.keyLength &&
              !UNPRINTABLE.test(value),
            keyRule,
          ),
        limit: integer(
          `must be an integer from 1 to ${JOB_LIMITS.maxConcurrency}`,
          1,
          JOB_LIMITS.maxConcurrency,
        ),
      },
      'must be an object such as {"key": "customer-7", "limit": 2}',
    )
    .nullish();
  const resources = z
    .unknown()
    .transform((value, context): Resources | null => {
      try {
        return parseResources(value);
      } catch (error) {
        const { message, details } = MillraceError.from(error);
        const name = details?.['name'];
        const path = typeof name === 'string' ? [name] : [];
        const input = typeof name === 'string' ? (value as JsonObject)[name] : value;
        context.addIssue({ code: 'custom', message, path, input });
        return z.NEVER;
      }
    })
    .optional();
  const prefixRule = `must be a path of at most ${JOB_LIMITS.prefixBytes} bytes without ".." segments and control characters`;
  const task = z.object(
    {
      label: name.nullish(),
      stage: name.nullish(),
      capability: z.unknown().transform((value, context) => {
        try {
          checkCapability(value);
          return value;
        } catch (error) {
          const rule = MillraceError.from(error).message.replace(/^capability (?:".*" )?/s, '');
          context.addIssue({ code: 'custom', message: rule.replace(/, got .*$/s, ''), input: value });
          return z.NEVER;
        }
      }),
      capability_filters: z
        .record(name, filter, filtersRule)
        .refine((filters) => Object.keys(filters).length <= JOB_LIMITS.filters, filtersRule)
        .nullish(),
      priority,
      inputs_cids: z
        .array(text(JOB_LIMITS.inputBytes), inputsRule)
        .max(JOB_LIMITS.inputsPerTask, inputsRule)
        .nullish(),
      outputs_prefix: text(JOB_LIMITS.prefixBytes, 0)
        .refine((value) => !value.split('/').includes('..'), prefixRule)
        .nullish(),
      mode: z.enum(['public', 'dedicated'], 'must be "public" or "dedicated"').nullish(),
      meta: z
        .unknown()
        .refine((value) => value === undefined || isJson(value, JOB_LIMITS.metaDepth), metaRule)
        .optional(),
      max_attempts: integer(
        `must be an integer from 1 to ${JOB_LIMITS.maxAttempts}`,
        1,
        JOB_LIMITS.maxAttempts,
      ).nullish(),
      deadline_at: deadline,
      not_before: notBefore,
      concurrency,
      resources,
    },
    'must be a JSON object',
  );
  const tasksRule = `must be an array of 1 to ${maxTasks} tasks`;
  const edgesRule = `must be an array of at most ${JOB_LIMITS.edges} {"from","to"} pairs of stage names`;
  const domainRule = 'must be a UUID';
  return z.object(
    {
      label: name.nullish(),
      domain_id: z
        .string(domainRule)
        .regex(UUID, domainRule)
        .transform((value) => value.toLowerCase())
        .nullish(),
      priority,
      meta: z
        .record(z.string(), z.unknown(), 'must be a JSON object')
        .refine((value) => isJson(value, JOB_LIMITS.metaDepth), metaRule)
        .nullish(),
      deadline_at: deadline,
      not_before: notBefore,
      concurrency,
      cache: z.boolean('must be true or false').nullish(),
      // The length is checked before the items, so that an endless list costs nothing.
      tasks: z
        .array(z.unknown(), tasksRule)
        .refine((tasks) => tasks.length >= 1 && tasks.length <= maxTasks, { error: tasksRule, abort: true })
        .pipe(z.array(task)),
      edges: z
        .array(z.unknown(), edgesRule)
        .refine((edges) => edges.length <= JOB_LIMITS.edges, { error: edgesRule, abort: true })
        .pipe(z.array(z.object({ from: name, to: name }, 'must be a {"from","to"} pair of stage names')))
        .nullish(),
    },
    'must be a JSON object',
  );
}

/** A label's value, or operators on it. */
function isFilter(value: unknown, isText: (value: unknown) => boolean): boolean {
  if (typeof value !== 'object' || value === null) return isText(value);
  try {
    const { matchExpressions } = selectorFromFilters({ label: value as JsonObject });
    return matchExpressions.every(
      ({ values }) => values.length <= JOB_LIMITS.filterValues && values.every(isText),
    );
  } catch {
    return false;
  }
}

/** True for values JSON can carry, nested at most `depth` deep. */
function isJson(value: unknown, depth: number): boolean {
  if (value === null || typeof value === 'string' || typeof value === 'boolean') return true;
  if (typeof value === 'number') return Number.isFinite(value);
  if (typeof value !== 'object' || depth === 0) return false;
  return Object.values(value).every((inner) => isJson(inner, depth - 1));
}

function distinctEdges(edges: readonly { readonly from: string; readonly to: string }[]): JobSpec['edges'] {
  const seen = new Set<string>();
  return edges.filter(({ from, to }) => {
    const key = JSON.stringify([from, to]);
    return !seen.has(key) && seen.add(key);
  });
}

function graphProblems(spec: JobSpec): string[] {
  const problems: string[] = [];
  const index = new Map<string, number>();
  for (const task of spec.tasks) if (!index.has(task.stage)) index.set(task.stage, index.size);
  const names = [...index.keys()];
  const next: number[][] = names.map(() => []);
  spec.edges.forEach(({ from, to }, at) => {
    const [source, target] = [index.get(from), index.get(to)];
    for (const [member, name] of [
      ['from', from],
      ['to', to],
    ] as const) {
      if (!index.has(name))
        problems.push(problem(`job.edges[${at}].${member}`, 'must be the stage of some task', name));
    }
    if (from === to) problems.push(problem(`job.edges[${at}]`, 'must not lead from a stage to itself', from));
    else if (source !== undefined && target !== undefined) next[source]?.push(target);
  });
  if (problems.length > 0) return problems;

  const order = topologicalOrder(next);
  if (order.cycle) {
    const path = order.cycle.map((stage) => names[stage]).join(' -> ');
    return [`job.edges must not form a cycle, got ${clip(path)}`];
  }
  return referenceProblems(spec, index, next, order.stages);
}

/** `stage:` inputs must name a stage that precedes, over any number of edges. */
function referenceProblems(
  spec: JobSpec,
  index: ReadonlyMap<string, number>,
  next: readonly (readonly number[])[],
  order: readonly number[],
): string[] {
  const problems: string[] = [];
  const isStage = (name: string): boolean => index.has(name);
  let ancestors: ((stage: number, ancestor: number) => boolean) | null = null;
  let inputs = 0;
  spec.tasks.forEach((task, at) => {
    inputs += task.inputs_cids.length;
    task.inputs_cids.forEach((input, position) => {
      const reference = parseStageReference(input, isStage);
      if (!reference) return;
      const path = `job.tasks[${at}].inputs_cids[${position}]`;
      const source = index.get(reference.stage);
      if (source === undefined) {
        problems.push(problem(path, 'must name a stage of this job', input));
        return;
      }
      ancestors ??= ancestry(next, order);
      if (!ancestors(index.get(task.stage) ?? -1, source)) {
        problems.push(
          problem(path, `must name a stage with edges leading to stage ${JSON.stringify(task.stage)}`, input),
        );
      }
      const glob = reference.glob ?? '';
      if (
        Buffer.byteLength(glob) > JOB_LIMITS.globBytes ||
        (glob.match(/\*+/g)?.length ?? 0) > JOB_LIMITS.globStars
      ) {
        const rule = `must have a pattern of at most ${JOB_LIMITS.globBytes} bytes and ${JOB_LIMITS.globStars} wildcards`;
        problems.push(problem(path, rule, input));
      }
    });
  });
  if (inputs > JOB_LIMITS.inputsPerJob) {
    problems.push(`job must have at most ${JOB_LIMITS.inputsPerJob} inputs in all, got ${inputs}`);
  }
  return problems;
}

/** The stages, each after all that precede it; or a cycle, its first stage repeated at the end. */
function topologicalOrder(next: readonly (readonly number[])[]): {
  stages: number[];
  cycle: number[] | null;
} {
  const stages: number[] = [];
  const mark = new Uint8Array(next.length); // 0 new, 1 on the path, 2 done
  for (let start = 0; start < next.length; start += 1) {
    if (mark[start] !== 0) continue;
    // An explicit stack: a chain may be as long as the job has tasks.
    const path: { stage: number; edge: number }[] = [{ stage: start, edge: 0 }];
    mark[start] = 1;
    for (let top = path.at(-1); top !== undefined; top = path.at(-1)) {
      const target = next[top.stage]?.[top.edge];
      if (target === undefined) {
        mark[top.stage] = 2;
        stages.push(top.stage);
        path.pop();
        continue;
      }
      top.edge += 1;
      if (mark[target] === 1) {
        const cycle = path.map(({ stage }) => stage);
        return { stages, cycle: [...cycle.slice(cycle.indexOf(target)), target] };
      }
      if (mark[target] === 0) {
        mark[target] = 1;
        path.push({ stage: target, edge: 0 });
      }
    }
  }
  return { stages: stages.toReversed(), cycle: null };
}

/** Who precedes whom, as one bit set per stage: 12 MiB for a job of 10,000 stages. */
function ancestry(
  next: readonly (readonly number[])[],
  order: readonly number[],
): (stage: number, ancestor: number) => boolean {
  const words = Math.ceil(next.length / 32);
  const bits = new Uint32Array(words * next.length);
  for (const stage of order) {
    for (const target of next[stage] ?? []) {
      for (let word = 0; word < words; word += 1) {
        const at = target * words + word;
        bits[at] = (bits[at] ?? 0) | (bits[stage * words + word] ?? 0);
      }
      const own = target * words + (stage >>> 5);
      bits[own] = (bits[own] ?? 0) | (1 << (stage & 31));
    }
  }
  return (stage, ancestor) => (((bits[stage * words + (ancestor >>> 5)] ?? 0) >>> (ancestor & 31)) & 1) === 1;
}

function problem(path: string, rule: string, value: unknown): string {
  return `${path} ${rule}, got ${shown(value)}`;
}

function shown(value: unknown): string {
  if (value === undefined) return 'nothing';
  try {
    return clip(JSON.stringify(value) ?? typeof value);
  } catch {
    // A program may hand over what no JSON text can hold, such as a BigInt or a cycle.
    return typeof value === 'object' ? 'an object that is not JSON' : typeof value;
  }
}

function clip(text: string): string {
  return text.length > 120 ? `${text.slice(0, 117)}...` : text;
}

function refusal(problems: readonly string[]): MillraceError {
  const shown = problems.slice(0, JOB_LIMITS.problems);
  const more = problems.length - shown.length;
  if (more > 0) shown.push(`and ${more} more problem${more === 1 ? '' : 's'}`);
  return new MillraceError('invalid_argument', shown.join('; '), { details: { problems: shown } });
}
