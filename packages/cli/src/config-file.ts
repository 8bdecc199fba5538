/** Finds, loads and checks the config file of {@link MillraceConfig}. */
import { access, readFile } from 'node:fs/promises';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { MillraceError, checkCapability, describeError, type Runner } from '@millrace/runner';
import { z } from 'zod';
import type { MillraceConfig, RunnerLimits } from './config.ts';
import { checkLocated, parseLocated, unlocated, type LocatedDocument } from './located-document.ts';
import { capabilitySchema } from './schemas.ts';

/** A runner to open, everything resolved; or one that the config file made itself. */
export type RunnerSpec = ModuleSpec | { readonly runner: Runner };

export interface ModuleSpec {
  /** Absolute path. */
  readonly module: string;
  readonly capability?: string;
  readonly limits: Partial<RunnerLimits>;
  readonly env?: Readonly<Record<string, string>>;
  readonly warm?: number;
}

export interface LoadedConfig {
  /** Null when there is none. */
  readonly file: string | null;
  readonly runners: readonly RunnerSpec[];
  readonly labels: Readonly<Record<string, string>>;
  /** For runners that the file does not list. */
  readonly limits: Partial<RunnerLimits>;
  readonly drainMs: number | null;
  readonly maxConcurrency: number | null;
}

const positive = z.int().min(1);
const limitMembers = {
  memoryMiB: z.int().min(8).max(65_536).exactOptional(),
  wallMs: positive.exactOptional(),
  loadMs: positive.exactOptional(),
  graceMs: z.int().min(0).exactOptional(),
  logBytes: z.int().min(0).exactOptional(),
};

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
        }),
      ]),
    )
    .exactOptional(),
  labels: z.record(z.string().min(1), z.string()).exactOptional(),
  limits: z.strictObject({ ...limitMembers, drainMs: z.int().min(0).exactOptional() }).exactOptional(),
  maxConcurrency: z.int().min(1).max(4096).exactOptional(),
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
    return { file, runners: [], labels: {}, limits: {}, drainMs: null, maxConcurrency: null };
  }
  const shown = path.relative(cwd, file) || file;
  const config = checkLocated(await readConfig(file, shown), configSchema);
  const { drainMs, ...limits } = config.limits ?? {};
  return {
    file,
    runners: (config.runners ?? []).map((entry): RunnerSpec => {
      if (typeof entry === 'object' && 'run' in entry) {
        checkCapability(entry.capability);
        return { runner: entry };
      }
      const spec = typeof entry === 'string' ? { module: entry } : entry;
      return {
        ...spec,
        module: path.resolve(path.dirname(file), spec.module),
        limits: { ...limits, ...spec.limits },
      };
    }),
    labels: config.labels ?? {},
    limits,
    drainMs: drainMs ?? null,
    maxConcurrency: config.maxConcurrency ?? null,
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
    const url = pathToFileURL(file).href;
    if (extension.endsWith('ts')) {
      // Only a TypeScript config pays for loading the compiler.
      const { tsImport } = await import('tsx/esm/api');
      module = (await tsImport(url, import.meta.url)) as typeof module;
    } else module = (await import(url)) as typeof module;
  } catch (error) {
    throw new MillraceError(
      'invalid_argument',
      `config file ${shown} does not load: ${describeError(error)}`,
      {
        cause: error,
      },
    );
  }
  // Without `"type": "module"` near it a .ts file is CommonJS, whose exports arrive as one object.
  const exported = module.default;
  const config =
    typeof exported === 'object' && exported !== null && 'default' in exported ? exported.default : exported;
  if (config === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `config file ${shown} has no default export; write "export default defineConfig({ … })"`,
    );
  }
  return unlocated(config, shown);
}
