/** Which labels a runner must have for a task to go to it. */
import { absent, arrayOf, object, string, type Decoder } from '../decode.ts';
import { MillraceError } from '../errors.ts';
import type { Json, JsonObject } from '../json.ts';
import { invalidModel } from './errors.ts';

/** Facts about a runner, or notes about a task. */
export type Labels = Readonly<Record<string, string>>;

export const SELECTOR_OPERATORS = ['In', 'NotIn', 'Exists', 'DoesNotExist'] as const;

export type SelectorOperator = (typeof SELECTOR_OPERATORS)[number];

/**
 * - `In` the label is there, with one of `values`
 * - `NotIn` the label has none of `values`; so has one that is not there
 * - `Exists`, `DoesNotExist` the label is there, or is not; `values` is empty
 */
export interface SelectorRequirement {
  readonly key: string;
  readonly operator: SelectorOperator;
  readonly values: readonly string[];
}

/** All of it must hold. Empty: every runner. Labels nothing is said about do not matter. */
export interface RunnerSelector {
  /** The label is there, with exactly this value. */
  readonly matchLabels: Labels;
  readonly matchExpressions: readonly SelectorRequirement[];
}

export function selectorMatches(selector: RunnerSelector, labels: Labels): boolean {
  return (
    Object.entries(selector.matchLabels).every(
      ([key, value]) => Object.hasOwn(labels, key) && labels[key] === value,
    ) && selector.matchExpressions.every((requirement) => requirementMatches(requirement, labels))
  );
}

function requirementMatches({ key, operator, values }: SelectorRequirement, labels: Labels): boolean {
  const value = Object.hasOwn(labels, key) ? labels[key] : undefined;
  if (operator === 'Exists') return value !== undefined;
  if (operator === 'DoesNotExist') return value === undefined;
  const named = value !== undefined && values.includes(value);
  return operator === 'In' ? named : !named;
}

/** @throws MillraceError `invalid_argument` for an empty key, or values that do not go with the operator. */
export function checkSelector(selector: RunnerSelector, path = 'runnerSelector'): void {
  if (Object.hasOwn(selector.matchLabels, '')) {
    throw invalidModel(`${path}.matchLabels`, 'selector label key cannot be empty');
  }
  selector.matchExpressions.forEach(({ key, operator, values }, index) => {
    const at = `${path}.matchExpressions[${index}]`;
    if (key === '') throw invalidModel(`${at}.key`, 'selector requirement key cannot be empty');
    const wantsValues = operator === 'In' || operator === 'NotIn';
    if (wantsValues === values.length > 0) return;
    throw invalidModel(
      `${at}.values`,
      `selector requirement '${key}' with operator ${operator} must ${wantsValues ? 'have non-empty values' : 'not have values'}`,
    );
  });
}

export const parseLabels: Decoder<Labels> = (value, path) =>
  Object.fromEntries(
    Object.entries(object(value, path)).map(([key, entry]) => [key, string(entry, `${path}.${key}`)]),
  );

const parseOperator: Decoder<SelectorOperator> = (value, path) => {
  const known = SELECTOR_OPERATORS.find((operator) => operator === value);
  if (known !== undefined) return known;
  throw new MillraceError(
    'invalid_argument',
    `${path} must be ${SELECTOR_OPERATORS.join(', ')}, got ${JSON.stringify(string(value, path).slice(0, 80))}`,
  );
};

/** @throws MillraceError `invalid_argument` for another shape, and as {@link checkSelector}. */
export const parseSelector: Decoder<RunnerSelector> = (value, path) => {
  const raw = object(value, path);
  const selector: RunnerSelector = {
    matchLabels: absent(parseLabels, () => ({}))(raw['matchLabels'], `${path}.matchLabels`),
    matchExpressions: absent(arrayOf(parseRequirement), () => [])(
      raw['matchExpressions'],
      `${path}.matchExpressions`,
    ),
  };
  checkSelector(selector, path);
  return selector;
};

const parseRequirement: Decoder<SelectorRequirement> = (value, path) => {
  const raw = object(value, path);
  return {
    key: string(raw['key'], `${path}.key`),
    operator: parseOperator(raw['operator'], `${path}.operator`),
    values: absent(arrayOf(string), () => [])(raw['values'], `${path}.values`),
  };
};

/** Both parts are left out when empty. */
export function selectorToJson({ matchLabels, matchExpressions }: RunnerSelector): JsonObject {
  return {
    ...(Object.keys(matchLabels).length > 0 && { matchLabels: labelsToJson(matchLabels) }),
    ...(matchExpressions.length > 0 && {
      matchExpressions: matchExpressions.map(({ key, operator, values }) => ({
        key,
        operator,
        ...(values.length > 0 && { values: [...values] }),
      })),
    }),
  };
}

/** Sorted by key. */
export function labelsToJson(labels: Labels): JsonObject {
  return Object.fromEntries(Object.entries(labels).toSorted(([a], [b]) => (a < b ? -1 : 1)));
}

/**
 * A task's `capability_filters` as a selector: a string is the value its label must have, an object has operators,
 * such as `{"In": ["a100", "h100"]}`, `{"NotIn": ["k80"]}`, `{"Exists": true}`, `{"DoesNotExist": true}`.
 * Null, and anything that is no object, asks for nothing, as on the wire.
 *
 * @throws MillraceError `invalid_argument` for an entry that is neither
 */
export function selectorFromFilters(filters: Json, path = 'capability_filters'): RunnerSelector {
  const matchLabels: Record<string, string> = Object.create(null) as Record<string, string>;
  const matchExpressions: SelectorRequirement[] = [];
  const entries =
    typeof filters === 'object' && filters !== null && !Array.isArray(filters) ? Object.entries(filters) : [];
  for (const [key, entry] of entries) {
    if (typeof entry === 'string') matchLabels[key] = entry;
    else matchExpressions.push(...parseFilterRule(entry, key, `${path}.${key}`));
  }
  return { matchLabels, matchExpressions };
}

const parseFilterRule = (value: Json, key: string, path: string): SelectorRequirement[] => {
  const refuse = (): never => {
    throw new MillraceError(
      'invalid_argument',
      `${path} must be a string, or an object of {"In": [strings]}, {"NotIn": [strings]}, {"Exists": true} and {"DoesNotExist": true}`,
    );
  };
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return refuse();
  const rules = Object.entries(value);
  if (rules.length === 0) return refuse();
  return rules.map(([name, operand]): SelectorRequirement => {
    const operator = SELECTOR_OPERATORS.find((known) => known === name);
    if (operator === 'Exists' || operator === 'DoesNotExist') {
      return operand === true ? { key, operator, values: [] } : refuse();
    }
    const isList = (list: Json): list is string[] =>
      Array.isArray(list) && list.length > 0 && list.every((item) => typeof item === 'string');
    return operator !== undefined && isList(operand) ? { key, operator, values: operand } : refuse();
  });
};
