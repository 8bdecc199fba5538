import { describe, expect, test } from 'vitest';
import type { Json } from '@millrace/runner';
import { checkParameters, checkRules, type Parameter } from './parameters.ts';

describe('values of meta', () => {
  test.each<[Parameter, Json, string | null]>([
    [{ type: 'integer', minimum: 1, maximum: 5 }, 1, null],
    [{ type: 'integer', minimum: 1, maximum: 5 }, 5, null],
    [{ type: 'integer', minimum: 1, maximum: 5 }, 6, 'meta.x must be at most 5, got 6'],
    [{ type: 'integer', minimum: 1, maximum: 5 }, 0, 'meta.x must be at least 1, got 0'],
    [{ type: 'integer' }, 1.5, 'meta.x must be a whole number, got 1.5'],
    [{ type: 'integer' }, '1', 'meta.x must be a whole number, got "1"'],
    [{ type: 'number' }, 1.5, null],
    [{ type: 'boolean' }, false, null],
    [{ type: 'boolean' }, 0, 'meta.x must be true or false, got 0'],
    [{ type: 'string', maxLength: 3 }, 'abc', null],
    [{ type: 'string', maxLength: 3 }, 'abcd', 'meta.x must be at most 3 characters long, got "abcd"'],
    [{ type: 'string', enum: ['a', 'b'] }, 'c', 'meta.x must be one of a, b, got "c"'],
    [{ type: 'string', pattern: 'a|b' }, 'b', null],
    [{ type: 'string', pattern: 'a|b' }, 'xb', 'meta.x must match a|b, got "xb"'],
    [{ type: 'string' }, null, 'meta.x is missing; it must be a string'],
    [{ type: 'integer' }, null, 'meta.x is missing; it must be a whole number'],
  ])('%j and %j: %s', (rule, value, message) => {
    const check = (): Json => checkParameters({ x: rule }, { x: value });
    if (message === null) expect(check()).toEqual({ x: value });
    else expect(check).toThrow(message);
  });

  test('what is absent has its default, and what is not declared is left out', () => {
    const rules: Record<string, Parameter> = {
      x: { type: 'integer', default: 3 },
      y: { type: 'string', default: '' },
    };
    expect(checkParameters(rules, { y: 'given', other: 1 })).toEqual({ x: 3, y: 'given' });
  });

  test('rules are checked themselves', () => {
    expect(() => checkRules({ x: { type: 'integer', maximum: 5, default: 6 } })).toThrow(
      'params.x.default must be at most 5',
    );
    expect(() => checkRules({ x: { type: 'string', pattern: '(' } })).toThrow(
      'params.x.pattern is no regular expression',
    );
  });
});
