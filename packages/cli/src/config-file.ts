/** Finds, loads and checks the config file of {@link MillraceConfig}. */
import { access, readFile } from 'node:fs/promises';
import path from 'node:path';
import { formatResources, parseResources } from '@millrace/dispatch/client';
import type { SupervisionOptions } from '@millrace/node';
import { MillraceError, checkCapability, describeError, type Runner } from '@millrace/runner';
import { z } from 'zod';
import type { ComputeConfig, MillraceConfig, RunnerLimits } from './config.ts';
import { checkLocated, parseLocated, unlocated, type LocatedDocument } from './located-document.ts';
import { capabilitySchema, resourcesSchema } from './schemas.ts';

/** A runner to open, everything resolved; or one that the config file made itself. */
export type RunnerSpec = (ModuleSpec | { readonly runner: Runner }) & RunnerPlace;

/** How a runner stands in the node. */
export interface RunnerPlace {
  readonly labels?: Readonly<Record<string, string>>;
  readonly supervision?: SupervisionOptions;
}

export interface ModuleSpec {
  /** Absolute path. */
  readonly module: string;
  readonly capability?: string;
  readonly limits: Partial<RunnerLimits>;
  readonly env?: Readonly<Record<string, string>>;
  readonly warm?: number;
}

/** How computes are run; paths are absolute. */
export type ComputeSpec = ComputeConfig;

export interface LoadedConfig {
  /** Null when there is none. */
  readonly file: string | null;
  readonly runners: readonly RunnerSpec[];
  /** False: no computes here. Null: the file does not say. */
  readonly compute: ComputeSpec | false | null;
  readonly labels: Readonly<Record<string, string>>;
  /** For runners that the file does not list. */
  readonly limits: Partial<RunnerLimits>;
  readonly drainMs: number | null;
  readonly maxConcurrency: number | null;
  /** As the variable `RESOURCES` has them. */
  readonly resources: string | null;
  readonly supervision: SupervisionOptions;
  /** For programs and containers that tasks name. */
  readonly env: Readonly<Record<string, string>>;
}

const positive = z.int().min(1);

function resourceText(resources: NonNullable<MillraceConfig['resources']>): string {
  return formatResources(parseResources(resources) ?? {});
}

const limitMembers = {
  memoryMiB: z.int().min(8).max(65_536).exactOptional(),
  wallMs: positive.exactOptional(),
  loadMs: positive.exactOptional(),
  graceMs: z.int().min(0).exactOptional(),
  logBytes: z.int().min(0).exactOptional(),
};

const computeSchema = z.strictObject({
  limits: z
    .strictObject({
      maxMemoryMb: z.int().min(1).max(4096).exactOptional(),
      maxWallMs: positive.exactOptional(),
      maxPrepareMs: positive.exactOptional(),
      maxInputBytes: z.int().min(0).exactOptional(),
      maxOutputBytes: z.int().min(0).exactOptional(),
      maxLogBytes: z.int().min(0).exactOptional(),
      maxModuleBytes: positive.exactOptional(),
      maxFunctions: z.int().min(0).exactOptional(),
      maxImports: z.int().min(0).exactOptional(),
      maxTableEntries: z.int().min(0).exactOptional(),
      maxFuel: z.int().min(0).exactOptional(),
    })
    .exactOptional(),
  workers: z.int().min(1).max(256).exactOptional(),
  plugins: z
    .array(
      z.strictObject({
        file: z.string().min(1),
        digest: z.string().regex(/^(?:sha256:)?[0-9a-f]{64}$/, 'must be 64 lower-case hex digits'),
      }),
    )
    .exactOptional(),
  cacheBytes: z.int().min(0).exactOptional(),
});

const runtimeSchema = z.strictObject({
  runtime: z.union([
    z.string().min(1),
    z.strictObject({ descriptor: z.string().min(1), dirs: z.array(z.string().min(1)).exactOptional() }),
  ]),
  name: z
    .string()
    .regex(/^[\w.-]+$/, 'must be letters, digits, ".", "_" and "-"')
    .exactOptional(),
  capability: capabilitySchema.exactOptional(),
  taskPackage: z.string().min(1).exactOptional(),
  args: z.array(z.string()).exactOptional(),
  env: z.record(z.string(), z.string()).exactOptional(),
  workDir: z.string().min(1).exactOptional(),
  limits: z
    .strictObject({
      deployMs: positive.exactOptional(),
      startMs: positive.exactOptional(),
      answerMs: positive.exactOptional(),
      runMs: positive.exactOptional(),
      stopMs: z.int().min(0).exactOptional(),
      exitMs: z.int().min(0).exactOptional(),
      killGraceMs: z.int().min(0).exactOptional(),
      outputBytes: z.int().min(0).exactOptional(),
      captureBytes: z.int().min(0).exactOptional(),
      maxFrameBytes: positive.exactOptional(),
      commands: positive.exactOptional(),
      abortMs: z.int().min(0).exactOptional(),
      capturedBytes: z.int().min(0).exactOptional(),
      outputFiles: z.int().min(0).exactOptional(),
      outputTotalBytes: z.int().min(0).exactOptional(),
      outputDepth: z.int().min(0).exactOptional(),
    })
    .exactOptional(),
});

const restartSchema = z.union([
  z.strictObject({ type: z.enum(['never', 'onFailure']) }),
  z.strictObject({ type: z.literal('always'), intervalMs: z.int().min(0).exactOptional() }),
]);

const supervisionSchema = z.strictObject({
  defaults: z
    .strictObject({
      slot: z.string().min(1).exactOptional(),
      admission: z.enum(['dropIfRunning', 'replace', 'queue']).exactOptional(),
      timeout: positive.exactOptional(),
      restart: restartSchema.exactOptional(),
      backoff: z
        .strictObject({
          jitter: z.enum(['none', 'full', 'equal', 'decorrelated']).exactOptional(),
          firstMs: positive.exactOptional(),
          maxMs: positive.exactOptional(),
          factor: z.number().min(1).exactOptional(),
        })
        .exactOptional(),
      maxRetries: z.int().min(0).exactOptional(),
    })
    .exactOptional(),
  restart: z.enum(['never', 'onFailure', 'always']).exactOptional(),
  maxRetries: z.int().min(0).exactOptional(),
  timeoutMs: positive.exactOptional(),
  floorMs: z.int().min(0).exactOptional(),
  queueLimit: z.int().min(0).exactOptional(),
}) satisfies z.ZodType<SupervisionOptions>;

/** What any runner may have beside itself. */
const placeMembers = {
  labels: z.record(z.string().min(1), z.string()).exactOptional(),
  supervision: supervisionSchema.exactOptional(),
};

/** No union: of what is wrong with one that would only say that it is neither. */
const computeMember = z.custom<boolean | ComputeConfig>().superRefine((value, context) => {
  if (typeof value === 'boolean') return;
  const { error } = computeSchema.safeParse(value, { reportInput: true });
  for (const { message, path: where, input } of error?.issues ?? []) {
    context.addIssue({ code: 'custom', message, path: where, input });
  }
});

const configSchema = z.strictObject({
  runners: z
    .array(
      z.union([
        z.custom<Runner>(isRunner),
        z.string().min(1),
        z.strictObject({
          module: z.string().min(1),
          capability: capabilitySchema.exactOptional(),
          limits: z.strictObject(limitMembers).exactOptional(),
          env: z.record(z.string(), z.string()).exactOptional(),
          warm: z.int().min(1).max(1024).exactOptional(),
          ...placeMembers,
        }),
        z.strictObject({ runner: z.custom<Runner>(isRunner), ...placeMembers }),
        runtimeSchema,
      ]),
    )
    .exactOptional(),
  compute: computeMember.exactOptional(),
  labels: z.record(z.string().min(1), z.string()).exactOptional(),
  limits: z.strictObject({ ...limitMembers, drainMs: z.int().min(0).exactOptional() }).exactOptional(),
  maxConcurrency: z.int().min(1).max(4096).exactOptional(),
  resources: resourcesSchema.exactOptional(),
  supervision: supervisionSchema.exactOptional(),
  env: z.record(z.string(), z.string()).exactOptional(),
}) satisfies z.ZodType<MillraceConfig>;

function isRunner(value: unknown): boolean {
  return typeof value === 'object' && value !== null && 'run' in value && typeof value.run === 'function';
}

const NAMES = ['ts', 'js', 'mjs', 'json', 'yaml', 'yml'].map((extension) => `millrace.config.${extension}`);

/**
 * Loads `given`, or the one config file in `cwd`, or nothing.
 *
 * @throws MillraceError `invalid_argument` naming file, path, rule and value; also when `cwd` holds two config files.
 */
export async function loadConfig(given: string | undefined, cwd: string): Promise<LoadedConfig> {
  const file = given === undefined ? await findConfig(cwd) : path.resolve(cwd, given);
  if (file === null) {
    return {
      file,
      runners: [],
      compute: null,
      labels: {},
      limits: {},
      drainMs: null,
      maxConcurrency: null,
      resources: null,
      supervision: {},
      env: {},
    };
  }
  const shown = path.relative(cwd, file) || file;
  const config = checkLocated(await readConfig(file, shown), configSchema);
  const { drainMs, ...limits } = config.limits ?? {};
  return {
    file,
    runners: await Promise.all(
      (config.runners ?? []).map(async (entry): Promise<RunnerSpec> => {
        if (typeof entry === 'object' && 'run' in entry) {
          checkCapability(entry.capability);
          return { runner: entry };
        }
        if (typeof entry === 'object' && 'runner' in entry) {
          checkCapability(entry.runner.capability);
          return entry;
        }
        if (typeof entry === 'object' && 'runtime' in entry) {
          // Only a config with a runtime pays for loading what drives it.
          const { runtimeRunner } = await import('./runtime-runner.ts');
          return { runner: await runtimeRunner(entry, path.dirname(file), shown) };
        }
        const spec = typeof entry === 'string' ? { module: entry } : entry;
        return {
          ...spec,
          module: path.resolve(path.dirname(file), spec.module),
          limits: { ...limits, ...spec.limits },
        };
      }),
    ),
    compute: computeSpec(config.compute, path.dirname(file)),
    labels: config.labels ?? {},
    limits,
    drainMs: drainMs ?? null,
    maxConcurrency: config.maxConcurrency ?? null,
    resources: config.resources === undefined ? null : resourceText(config.resources),
    supervision: config.supervision ?? {},
    env: config.env ?? {},
  };
}

function computeSpec(compute: MillraceConfig['compute'], dir: string): LoadedConfig['compute'] {
  if (compute === true) return {};
  if (typeof compute !== 'object') return compute ?? null;
  if (compute.plugins === undefined) return compute;
  return {
    ...compute,
    plugins: compute.plugins.map((plugin) => ({ ...plugin, file: path.resolve(dir, plugin.file) })),
  };
}

async function findConfig(cwd: string): Promise<string | null> {
  const found: string[] = [];
  for (const name of NAMES) {
    if (
      await access(path.join(cwd, name)).then(
        () => true,
        () => false,
      )
    )
      found.push(name);
  }
  if (found.length > 1) {
    throw new MillraceError(
      'invalid_argument',
      `${cwd} holds ${found.join(' and ')}; keep one, or choose with --config`,
    );
  }
  return found[0] === undefined ? null : path.join(cwd, found[0]);
}

async function readConfig(file: string, shown: string): Promise<LocatedDocument> {
  const extension = path.extname(file);
  if (extension === '.json' || extension === '.yaml' || extension === '.yml') {
    const text = await readFile(file, 'utf8').catch((error: unknown) => {
      throw new MillraceError('invalid_argument', `cannot read the config file ${shown}`, { cause: error });
    });
    return parseLocated(text, shown);
  }
  if (!['.ts', '.mts', '.js', '.mjs'].includes(extension)) {
    throw new MillraceError(
      'invalid_argument',
      `config file ${shown}: the name must end in .ts, .js, .mjs, .json, .yaml or .yml`,
    );
  }
  let module: { readonly default?: unknown };
  try {
    const { importConfig } = await import('./config-module.ts');
    module = await importConfig(file);
  } catch (error) {
    throw new MillraceError(
      'invalid_argument',
      `config file ${shown} does not load: ${describeError(error)}`,
      {
        cause: error,
      },
    );
  }
  const config = module.default;
  if (config === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `config file ${shown} has no default export; write "export default defineConfig({ … })"`,
    );
  }
  return unlocated(config, shown);
}
