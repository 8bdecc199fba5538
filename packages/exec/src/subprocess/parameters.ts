/** Rules for values of a task's `meta`, declared by the operator and checked before anything is fetched or started. */
import { MillraceError, type Json, type JsonObject } from '@millrace/runner';

/** What a value of `meta` must be. Without a default the task must give it. */
export type Parameter =
  | {
      readonly type: 'integer' | 'number';
      readonly minimum?: number;
      readonly maximum?: number;
      readonly default?: number;
    }
  | {
      readonly type: 'string';
      /** The only values allowed. */
      readonly enum?: readonly string[];
      /** A regular expression the whole value must match. */
      readonly pattern?: string;
      /** In characters. Default 1024. */
      readonly maxLength?: number;
      readonly default?: string;
    }
  | { readonly type: 'boolean'; readonly default?: boolean };

const DEFAULT_MAX_LENGTH = 1024;

/**
 * The declared members of `meta`, checked, with the defaults of those that are absent or null. Others are left out.
 *
 * @throws MillraceError `invalid_argument`, naming the member, the rule and the value.
 */
export function checkParameters(rules: Readonly<Record<string, Parameter>>, meta: JsonObject): JsonObject {
  return Object.fromEntries(
    Object.entries(rules).map(([key, rule]): [string, Json] => {
      const value = meta[key] ?? rule.default ?? null;
      const problem = parameterProblem(rule, value);
      if (problem === null) return [key, value];
      const given = value === null ? '' : `, got ${(JSON.stringify(value) ?? '').slice(0, 100)}`;
      throw new MillraceError('invalid_argument', `meta.${key} ${problem}${given}`);
    }),
  );
}

/** Checks the rules themselves. @throws MillraceError `invalid_argument`, naming the rule. */
export function checkRules(rules: Readonly<Record<string, Parameter>>): void {
  for (const [key, rule] of Object.entries(rules)) {
    if (rule.type === 'string' && rule.pattern !== undefined) {
      try {
        wholeMatch(rule.pattern);
      } catch (error) {
        throw new MillraceError('invalid_argument', `params.${key}.pattern is no regular expression`, {
          cause: error,
        });
      }
    }
    if (rule.default === undefined) continue;
    const problem = parameterProblem(rule, rule.default);
    if (problem !== null) throw new MillraceError('invalid_argument', `params.${key}.default ${problem}`);
  }
}

function parameterProblem(rule: Parameter, value: Json): string | null {
  if (value === null) {
    return `is missing; it must be ${rule.type === 'integer' ? 'a whole number' : `a ${rule.type}`}`;
  }
  if (rule.type === 'boolean') return typeof value === 'boolean' ? null : 'must be true or false';
  return rule.type === 'string' ? textProblem(rule, value) : numberProblem(rule, value);
}

function numberProblem(rule: Extract<Parameter, { minimum?: number }>, value: Json): string | null {
  const fits = rule.type === 'integer' ? Number.isSafeInteger(value) : Number.isFinite(value);
  if (!fits) return `must be a ${rule.type === 'integer' ? 'whole ' : ''}number`;
  const { minimum = -Infinity, maximum = Infinity } = rule;
  if ((value as number) < minimum) return `must be at least ${minimum}`;
  return (value as number) > maximum ? `must be at most ${maximum}` : null;
}

function textProblem(rule: Extract<Parameter, { type: 'string' }>, value: Json): string | null {
  if (typeof value !== 'string') return 'must be a string';
  const { maxLength = DEFAULT_MAX_LENGTH, enum: allowed, pattern } = rule;
  if (value.length > maxLength) return `must be at most ${maxLength} characters long`;
  if (allowed !== undefined && !allowed.includes(value)) return `must be one of ${allowed.join(', ')}`;
  return pattern === undefined || wholeMatch(pattern).test(value) ? null : `must match ${pattern}`;
}

function wholeMatch(pattern: string): RegExp {
  return new RegExp(`^(?:${pattern})$`, 'u');
}
