/** `op://name` in a job file: a compute whose source lies beside it. */
import { access } from 'node:fs/promises';
import path from 'node:path';
import type { Json } from '@millrace/runner';
import { computeError } from '../errors.ts';
import { buildCompute, COMPUTE_ENDINGS } from './build.ts';
import type { BuiltCompute } from './build.ts';

const OP = 'op://';
const NAME = /^[A-Za-z0-9_-]+$/;

export interface ResolvedOps {
  /** The value with every `op://name` text replaced by the ref of what was built. */
  readonly value: Json;
  /** What was built, each artifact once, to be stored before the job is submitted. */
  readonly computes: readonly BuiltCompute[];
}

/**
 * Replaces every text `op://name` in a JSON value by a ref: of `name.wasm` beside the job file as it is, else of `name.ts`,
 * `.mts`, `.js` or `.mjs` there, built. Only whole texts are replaced; names are letters, digits, `_` and `-`. The value
 * handed in is left alone.
 *
 * @param dir the job file's folder.
 * @throws MillraceError `invalid_argument` for a malformed name, saying which text; `not_found` when no such file lies there;
 * what {@link buildCompute} throws.
 */
export async function resolveOps(dir: string, value: Json): Promise<ResolvedOps> {
  const names = new Set<string>();
  collect(value, names);
  const built = new Map<string, BuiltCompute>();
  await Promise.all([...names].map(async (name) => void built.set(name, await buildOp(dir, name))));
  const byRef = new Map<string, BuiltCompute>();
  for (const name of names) {
    const one = built.get(name) as BuiltCompute;
    byRef.set(one.ref, one);
  }
  return { value: replaced(value, built), computes: [...byRef.values()] };
}

function collect(value: Json, names: Set<string>): void {
  if (typeof value === 'string') {
    if (!value.startsWith(OP)) return;
    const name = value.slice(OP.length);
    if (!NAME.test(name)) {
      throw computeError(
        'invalid_argument',
        'bad-ref',
        `compute: ${JSON.stringify(value)} names no compute; want op:// and a name of letters, digits, _ and -, without ending or folder`,
      );
    }
    names.add(name);
  } else if (typeof value === 'object' && value !== null) {
    for (const one of Object.values(value)) if (one !== undefined) collect(one, names);
  }
}

function replaced(value: Json, built: ReadonlyMap<string, BuiltCompute>): Json {
  if (typeof value === 'string') {
    return value.startsWith(OP) ? (built.get(value.slice(OP.length))?.ref ?? value) : value;
  }
  if (typeof value !== 'object' || value === null) return value;
  if (Array.isArray(value)) return value.map((one: Json) => replaced(one, built));
  return Object.fromEntries(
    Object.entries(value).flatMap(([key, one]) => (one === undefined ? [] : [[key, replaced(one, built)]])),
  );
}

async function buildOp(dir: string, name: string): Promise<BuiltCompute> {
  for (const ending of COMPUTE_ENDINGS) {
    const entry = path.join(dir, name + ending);
    const there = await access(entry).then(
      () => true,
      () => false,
    );
    if (there) return buildCompute({ entry });
  }
  throw computeError(
    'not_found',
    'not-found',
    `compute: op://${name} is not there: put ${COMPUTE_ENDINGS.map((ending) => name + ending).join(', ')} into ${dir}`,
  );
}
