/**
 * Job files: the posemesh job spec as YAML or JSON, everything optional that has a default. Beside what the wire knows, an
 * entry of `inputs_cids` may be a local file, which is uploaded first and replaced by its data id:
 *
 * - `file:./photo.jpg` relative to the job file (or an absolute `file:///…` URL)
 * - `input:photo` whatever `--input photo=FILE` names; `-` is stdin
 */
import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import type { Readable } from 'node:stream';
import { text as readText } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import type { JobSubmission } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { z } from 'zod';
import { checkLocated, parseLocated } from './located-document.ts';
import { capabilitySchema, resourcesSchema } from './schemas.ts';

const name = z.string().min(1);
const time = z.iso.datetime({ offset: true });

const filter = z.union(
  [z.string(), z.record(z.string(), z.json())],
  'expected a string, or operators such as {"In": ["a", "b"]}',
);

const concurrency = z.strictObject({ key: name, limit: z.int().min(1).max(1_000_000) }).nullish();

// As on the wire, an optional member that is null counts as absent.
const taskSchema = z.strictObject({
  label: z.string().nullish(),
  stage: name.nullish(),
  capability: capabilitySchema,
  // What an object may say is the dispatcher's to judge.
  capability_filters: z.record(z.string(), filter).nullish(),
  priority: z.int().nullish(),
  inputs_cids: z.array(name).nullish(),
  outputs_prefix: z.string().nullish(),
  mode: z.enum(['public', 'dedicated']).nullish(),
  meta: z.json().nullish(),
  max_attempts: z.int().min(1).nullish(),
  deadline_at: time.nullish(),
  not_before: time.nullish(),
  concurrency,
  resources: resourcesSchema.nullish(),
});

const jobSchema = z.strictObject({
  label: z.string().nullish(),
  domain_id: name.nullish(),
  priority: z.int().nullish(),
  meta: z.record(z.string(), z.json()).nullish(),
  deadline_at: time.nullish(),
  not_before: time.nullish(),
  concurrency,
  tasks: z.array(taskSchema).min(1),
  edges: z.array(z.strictObject({ from: name, to: name })).nullish(),
  cache: z.boolean().nullish(),
});

/** A job as read, and the folder its `file:` references are relative to. */
export interface JobFile {
  readonly job: JobSubmission;
  readonly baseDir: string;
}

/**
 * Reads a job file; `-` is stdin, with references relative to `cwd`.
 *
 * @throws MillraceError `invalid_argument` with file, line, path, rule and value.
 */
export async function readJobFile(file: string, cwd: string, stdin: Readable): Promise<JobFile> {
  if (file === '-') return { job: parseJob(await readText(stdin), 'stdin'), baseDir: cwd };
  const full = path.resolve(cwd, file);
  let content: string;
  try {
    content = await readFile(full, 'utf8');
  } catch (error) {
    throw new MillraceError('invalid_argument', `cannot read the job file ${file}`, { cause: error });
  }
  return { job: parseJob(content, file), baseDir: path.dirname(full) };
}

/** The job in `content`. `file` is for messages. */
export function parseJob(content: string, file: string): JobSubmission {
  return checkLocated(parseLocated(content, file), jobSchema) as JobSubmission;
}

/** Where the bytes of a local input come from. */
export type InputSource = { readonly kind: 'file'; readonly path: string } | { readonly kind: 'stdin' };

/** `name=FILE` options as a map. @throws MillraceError `invalid_argument` for bad shape and repeated names. */
export function parseNamedInputs(values: readonly string[], cwd: string): Map<string, InputSource> {
  const named = new Map<string, InputSource>();
  for (const value of values) {
    const at = value.indexOf('=');
    const key = value.slice(0, at);
    if (at <= 0 || at === value.length - 1) {
      throw new MillraceError(
        'invalid_argument',
        `--input must be name=FILE beside a job file, where "input:name" in inputs_cids stands for it; got ${JSON.stringify(value)}`,
      );
    }
    if (named.has(key)) throw new MillraceError('invalid_argument', `--input ${key}=… is given twice`);
    named.set(key, parseInput(value.slice(at + 1), cwd));
  }
  return named;
}

/** A file's path, or `-`. */
export function parseInput(value: string, cwd: string): InputSource {
  return value === '-' ? { kind: 'stdin' } : { kind: 'file', path: path.resolve(cwd, value) };
}

/**
 * What has to be uploaded for a job: its local references and their sources. Every file is looked at now, so that a
 * missing one is found before anything was sent.
 *
 * @throws MillraceError `invalid_argument` for a reference without a source, a source without a reference, a file that is
 * not there, and stdin used twice.
 */
export async function collectInputs(
  { job, baseDir }: JobFile,
  named: ReadonlyMap<string, InputSource>,
): Promise<Map<string, InputSource>> {
  const sources = new Map<string, InputSource>();
  const unused = new Set(named.keys());
  for (const reference of job.tasks.flatMap((task) => task.inputs_cids ?? [])) {
    if (sources.has(reference)) continue;
    if (reference.startsWith('input:')) {
      const key = reference.slice('input:'.length);
      const source = named.get(key);
      if (source === undefined) {
        throw new MillraceError('invalid_argument', `the job uses "${reference}"; pass --input ${key}=FILE`);
      }
      unused.delete(key);
      sources.set(reference, source);
    } else if (reference.startsWith('file:')) {
      sources.set(reference, { kind: 'file', path: filePath(reference, baseDir) });
    }
  }
  for (const key of unused) {
    throw new MillraceError(
      'invalid_argument',
      `--input ${key}=… is not used: no task has "input:${key}" in its inputs_cids`,
    );
  }
  await checkSources([...sources.values()]);
  return sources;
}

/**
 * The same, without keeping the result, and with the job file's own use of stdin.
 *
 * @throws MillraceError as {@link collectInputs}
 */
export async function checkInputs(
  file: JobFile,
  named: ReadonlyMap<string, InputSource>,
  jobIsStdin: boolean,
): Promise<void> {
  const sources = await collectInputs(file, named);
  if (jobIsStdin && [...sources.values()].some((source) => source.kind === 'stdin')) {
    throw new MillraceError('invalid_argument', 'stdin (-) cannot be the job file and an input');
  }
}

/** @throws MillraceError `invalid_argument` for a file that cannot be used, and for stdin used twice. */
async function checkSources(sources: readonly InputSource[]): Promise<void> {
  if (new Set(sources.filter((source) => source.kind === 'stdin')).size > 1) {
    throw new MillraceError('invalid_argument', 'stdin (-) can be only one input');
  }
  for (const source of sources) {
    if (source.kind === 'stdin') continue;
    const info = await stat(source.path).catch((error: unknown) => {
      throw new MillraceError('invalid_argument', `cannot read the input ${source.path}`, { cause: error });
    });
    if (info.isDirectory()) {
      throw new MillraceError('invalid_argument', `the input ${source.path} is a folder; name a file`);
    }
  }
}

/** The job with every local reference replaced. */
export function replaceInputs(job: JobSubmission, ids: ReadonlyMap<string, string>): JobSubmission {
  return {
    ...job,
    tasks: job.tasks.map((task) =>
      task.inputs_cids === undefined
        ? task
        : { ...task, inputs_cids: task.inputs_cids.map((reference) => ids.get(reference) ?? reference) },
    ),
  };
}

function filePath(reference: string, baseDir: string): string {
  if (reference.startsWith('file://')) {
    try {
      return fileURLToPath(reference);
    } catch (error) {
      throw new MillraceError(
        'invalid_argument',
        `inputs_cids: ${JSON.stringify(reference)} is not a file URL`,
        {
          cause: error,
        },
      );
    }
  }
  return path.resolve(baseDir, reference.slice('file:'.length));
}
