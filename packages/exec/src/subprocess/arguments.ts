/**
 * Arguments with placeholders. A placeholder becomes text inside of one argument, or several whole arguments; no shell ever
 * reads it, so spaces, quotes and `;` in a value are just characters.
 *
 *     {input:NAME}   path of an input            {inputs}   paths of all inputs, one argument each
 *     {output:NAME}  path for an output          {outdir}   the folder of outputs
 *     {meta:KEY}     a value of the task's meta  {workdir}  the folder the program starts in
 *     {meta:KEY=X}   the same, or X when the task has none
 *
 * Doubled braces stand for themselves: `{{inputs}}` is the text `{inputs}`.
 */
import { MillraceError, type Json, type JsonObject } from '@millrace/runner';
import { checkRelativePath } from './file-names.ts';

type Part =
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'input' | 'output'; readonly name: string }
  | { readonly kind: 'meta'; readonly key: string; readonly fallback: string | null }
  | { readonly kind: 'inputs' | 'outdir' | 'workdir' };

/** One argument of a command, parsed. */
export type ArgumentTemplate = readonly Part[];

export interface ArgumentValues {
  /** By name, in order; the paths as the program sees them. */
  readonly inputs: ReadonlyMap<string, string>;
  readonly outputDir: string;
  readonly workDir: string;
  readonly meta: JsonObject;
}

/** `{{…}}`, or `{word}`, or `{word:anything}`. */
const PLACEHOLDER = /\{\{([a-z]+(?::[^{}]*)?)\}\}|\{([a-z]+)(?::([^{}]*))?\}/g;

/** Longer values are no parameters; they belong in an input. The kernel takes 128 KiB. */
const MAX_VALUE_BYTES = 32 * 1024;

/**
 * Parses the arguments of a command. `from` names them in errors.
 *
 * @param unknown What to do with `{word}` that is none of the placeholders: `refuse` it, as a typing error of an operator, or leave
 * it as `text`, such as a program for awk.
 * @throws MillraceError `invalid_argument`, naming the argument.
 */
export function parseArguments(
  from: string,
  args: readonly string[],
  unknown: 'refuse' | 'text',
): ArgumentTemplate[] {
  return args.map((arg, index) => {
    const where = `${from}[${index}]`;
    if (typeof arg !== 'string') {
      throw new MillraceError('invalid_argument', `${where} must be a string, got ${JSON.stringify(arg)}`);
    }
    if (arg.includes('\0'))
      throw new MillraceError('invalid_argument', `${where} must not contain a NUL character`);
    const parts: Part[] = [];
    let end = 0;
    for (const match of arg.matchAll(PLACEHOLDER)) {
      const [whole, escaped, word, detail] = match;
      const part =
        escaped === undefined ? placeholder(where, word!, detail) : unescaped(where, escaped, unknown);
      if (part === null && unknown === 'refuse') {
        throw new MillraceError(
          'invalid_argument',
          `${where}: ${whole} is no placeholder; there are {input:NAME}, {inputs}, {output:NAME}, {outdir}, {workdir} and ` +
            `{meta:KEY}; write {${whole}} for the text itself`,
        );
      }
      parts.push({ kind: 'text', text: arg.slice(end, match.index) }, part ?? { kind: 'text', text: whole });
      end = match.index + whole.length;
    }
    parts.push({ kind: 'text', text: arg.slice(end) });
    const kept = parts.filter((part) => part.kind !== 'text' || part.text !== '');
    if (kept.length > 1 && kept.some((part) => part.kind === 'inputs')) {
      throw new MillraceError(
        'invalid_argument',
        `${where}: {inputs} stands for several arguments, so it must be an argument by itself`,
      );
    }
    return kept;
  });
}

function placeholder(where: string, word: string, detail: string | undefined): Part | null {
  switch (word) {
    case 'input':
      return detail === undefined ? null : { kind: 'input', name: detail };
    case 'output':
      return detail === undefined
        ? null
        : { kind: 'output', name: checkRelativePath(`${where}: output`, detail) };
    case 'meta': {
      const [, key, , fallback] = /^([^=]+)(=(.*))?$/s.exec(detail ?? '') ?? [];
      return key === undefined ? null : { kind: 'meta', key, fallback: fallback ?? null };
    }
    case 'inputs':
    case 'outdir':
    case 'workdir':
      return detail === undefined ? { kind: word } : null;
    default:
      return null;
  }
}

/** Doubled braces around what would else be a placeholder. */
function unescaped(where: string, inner: string, unknown: 'refuse' | 'text'): Part {
  const [word = '', ...rest] = inner.split(':');
  const known = placeholder(where, word, rest.length === 0 ? undefined : rest.join(':')) !== null;
  return { kind: 'text', text: known || unknown === 'refuse' ? `{${inner}}` : `{{${inner}}}` };
}

/** The names the arguments use, for checking them before any task comes. */
export function namesIn(templates: readonly ArgumentTemplate[], kind: 'input' | 'output' | 'meta'): string[] {
  return templates.flatMap((template) =>
    template.flatMap((part) => {
      if (part.kind !== kind) return [];
      return [part.kind === 'meta' ? part.key : (part as { readonly name: string }).name];
    }),
  );
}

/**
 * The arguments of one attempt.
 *
 * @throws MillraceError `invalid_argument` for a missing input, and for a meta value that is missing, no text, number or boolean, too long,
 * or a text that the program would take for an option because an argument begins with it and it begins with `-`.
 */
export function fillArguments(templates: readonly ArgumentTemplate[], values: ArgumentValues): string[] {
  return templates.flatMap((template) => {
    const [only] = template;
    if (only?.kind === 'inputs') return [...values.inputs.values()];
    return [template.map((part, index) => fill(part, index === 0, values)).join('')];
  });
}

/** Checks the values that come from meta, before any input is fetched. @throws as {@link fillArguments}. */
export function checkMetaValues(templates: readonly ArgumentTemplate[], meta: JsonObject): void {
  for (const template of templates) {
    template.forEach((part, index) => {
      if (part.kind === 'meta') metaText(part.key, meta[part.key] ?? part.fallback, index === 0);
    });
  }
}

function fill(part: Part, first: boolean, { inputs, outputDir, workDir, meta }: ArgumentValues): string {
  if (part.kind === 'text') return part.text;
  if (part.kind === 'outdir') return outputDir;
  if (part.kind === 'workdir') return workDir;
  if (part.kind === 'output') return `${outputDir}/${part.name}`;
  if (part.kind === 'meta') return metaText(part.key, meta[part.key] ?? part.fallback, first);
  const path = part.kind === 'input' ? inputs.get(part.name) : undefined;
  if (path !== undefined) return path;
  const wanted = part.kind === 'input' ? `an input named ${JSON.stringify(part.name)}` : 'inputs';
  throw new MillraceError(
    'invalid_argument',
    `the command needs ${wanted}; inputs of this task: ${[...inputs.keys()].join(', ') || 'none'}`,
  );
}

function metaText(key: string, value: Json, first: boolean): string {
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `meta.${key} ${rule}`);
  };
  if (value === null) return refuse('is missing, and the command needs it');
  if (typeof value === 'object')
    return refuse(
      `must be a string, number or boolean, got ${Array.isArray(value) ? 'an array' : 'an object'}`,
    );
  const text = String(value);
  const bytes = Buffer.byteLength(text);
  if (bytes > MAX_VALUE_BYTES)
    return refuse(`must be at most ${MAX_VALUE_BYTES} bytes long, it has ${bytes}`);
  if (text.includes('\0')) return refuse('must not contain a NUL character');
  if (first && text.startsWith('-') && Number.isNaN(Number(text))) {
    return refuse('must not begin with "-", which the program would take for an option');
  }
  return text;
}
