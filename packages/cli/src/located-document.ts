/**
 * YAML and JSON files written by people, checked against a schema so that every complaint says file, line, path, rule
 * and value. JSON is read as the YAML it is, which gives both the same positions and the same duplicate-key check.
 */
import { MillraceError } from '@millrace/runner';
import { LineCounter, parseDocument, type Document } from 'yaml';
import { z } from 'zod';

export interface LocatedDocument {
  readonly file: string;
  readonly value: unknown;
  /** `file:line:column` of the member at `path`, or of its nearest parent that exists. */
  locate(path: readonly PropertyKey[]): string;
}

const MAX_PROBLEMS = 5;

/**
 * Parses the text of `file`.
 *
 * @throws MillraceError `invalid_argument` with line and column for each syntax error, up to five.
 */
export function parseLocated(text: string, file: string): LocatedDocument {
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false });
  const problems = document.errors.map((error) => `${position(file, lines, error.pos[0])}: ${error.message}`);
  if (problems.length > 0) throw invalid(problems);
  let value: unknown;
  try {
    value = document.toJS({ maxAliasCount: 100 });
  } catch (error) {
    throw new MillraceError(
      'invalid_argument',
      `${file}: ${error instanceof Error ? error.message : String(error)}`,
      {
        cause: error,
      },
    );
  }
  return { file, value, locate: (path) => locate(document, lines, file, path) };
}

/** A document that came from code; there are no lines to point at. */
export function unlocated(value: unknown, file: string): LocatedDocument {
  return { file, value, locate: () => file };
}

/**
 * The document's value by `schema`.
 *
 * @throws MillraceError `invalid_argument` naming position, path, rule and value of each problem, up to five.
 */
export function checkLocated<T>(document: LocatedDocument, schema: z.ZodType<T>): T {
  const result = schema.safeParse(document.value, { reportInput: true });
  if (result.success) return result.data;
  throw invalid(
    result.error.issues.flatMap(closestIssues).map((issue) => {
      // An unknown key is pointed at itself, not at the object it is in.
      const path = issue.code === 'unrecognized_keys' ? [...issue.path, issue.keys[0] ?? ''] : issue.path;
      const name = pathText(issue.path);
      return `${document.locate(path)}: ${name === '' ? '' : `${name}: `}${rule(issue, schema)}`;
    }),
  );
}

/** What is wrong by the one form of a union that was meant: whose required members are there, and no others. Else the issue. */
function closestIssues(issue: z.core.$ZodIssue): readonly z.core.$ZodIssue[] {
  if (issue.code !== 'invalid_union') return [issue];
  const meant = issue.errors.filter((issues) =>
    issues.every(({ path, input }) => path.length > 0 && input !== undefined),
  );
  if (meant.length !== 1) return [issue];
  return meant[0]!.flatMap((inner) => closestIssues({ ...inner, path: [...issue.path, ...inner.path] }));
}

function rule(issue: z.core.$ZodIssue, schema: z.ZodType): string {
  if (issue.code === 'unrecognized_keys') {
    const unknown = issue.keys.map((key) => JSON.stringify(key)).join(', ');
    const known = knownMembers(schema, issue.path);
    return `unknown ${issue.keys.length === 1 ? 'member' : 'members'} ${unknown}${known === null ? '' : `; known are ${known.join(', ')}`}`;
  }
  const message = issue.message.replace(/^Invalid input: /, '');
  if (issue.input === undefined) return message.endsWith('received undefined') ? 'is missing' : message;
  const value = JSON.stringify(issue.input) ?? typeof issue.input;
  return `${message.replace(/, received \w+$/, '')}, got ${value.length > 60 ? `${value.slice(0, 59)}…` : value}`;
}

/** Of the object that `schema` has at `path`; null where a union leaves open which one it is. */
function knownMembers(schema: unknown, path: readonly PropertyKey[]): readonly string[] | null {
  let at = schema;
  const steps = [...path];
  for (;;) {
    if (at instanceof z.ZodOptional || at instanceof z.ZodExactOptional || at instanceof z.ZodNullable) {
      at = at.unwrap();
      continue;
    }
    const step = steps.shift();
    if (at instanceof z.ZodArray) at = at.element;
    else if (!(at instanceof z.ZodObject)) return null;
    else if (step === undefined) return Object.keys(at.shape);
    else at = (at.shape as Readonly<Record<PropertyKey, unknown>>)[step];
  }
}

/** `tasks[0].capability`. */
function pathText(path: readonly PropertyKey[]): string {
  return path
    .map((step, index) =>
      typeof step === 'number' ? `[${step}]` : `${index === 0 ? '' : '.'}${String(step)}`,
    )
    .join('');
}

function invalid(problems: readonly string[]): MillraceError {
  const more = problems.length - MAX_PROBLEMS;
  return new MillraceError(
    'invalid_argument',
    problems.slice(0, MAX_PROBLEMS).join('; ') + (more > 0 ? `; and ${more} more` : ''),
  );
}

function locate(document: Document, lines: LineCounter, file: string, path: readonly PropertyKey[]): string {
  for (let length = path.length; length >= 0; length -= 1) {
    const steps = path.slice(0, length);
    const node = steps.length === 0 ? document.contents : document.getIn(steps, true);
    const range = (node as { readonly range?: readonly number[] } | null | undefined)?.range;
    if (range?.[0] !== undefined) return position(file, lines, range[0]);
  }
  return position(file, lines, 0);
}

function position(file: string, lines: LineCounter, offset: number): string {
  const { line, col } = lines.linePos(offset);
  return `${file}:${Math.max(1, line)}:${Math.max(1, col)}`;
}
