import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MAX_JSON_DEPTH, jsonProblem } from './json-text.ts';

const problem = (text: string): string | null => jsonProblem(new TextEncoder().encode(text));

function parses(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

describe('a JSON document', () => {
  test('is whatever JSON.stringify writes, with any white space', () => {
    fc.assert(
      fc.property(fc.jsonValue(), fc.constantFrom(undefined, 1, '\t'), (value, indent) => {
        expect(problem(JSON.stringify(value, null, indent))).toBeNull();
      }),
    );
  });

  test('is exactly what JSON.parse takes', () => {
    const piece = fc.constantFrom(
      ...'{}[],:"\\ \n0123456789.eE+-u/bfnrt'.split(''),
      'true',
      'false',
      'null',
      '"a"',
      '"a":',
      '1',
      '\\u00e9',
      '{"a":1}',
      '[]',
      '{}',
      '\u0001',
    );
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 12 }), (pieces) => {
        const text = pieces.join('');
        expect(problem(text) === null).toBe(parses(text));
      }),
      { numRuns: 5_000 },
    );
  });

  test.each([
    ['', 'empty'],
    [' ', 'cut short after 1 bytes'],
    ['{"a":1', 'cut short after 6 bytes'],
    ['[1,]', "']' is not expected at byte 3"],
    ['{} {}', "'{' is not expected at byte 3"],
    ['"a\n"', '0xa is not expected at byte 2'],
    ['\ufeff{}', '0xef is not expected at byte 0'],
    ['01', "'1' is not expected at byte 1"],
  ])('%j is none: %s', (text, says) => {
    expect(problem(text)).toBe(says);
  });

  test('is UTF-8', () => {
    expect(jsonProblem(Uint8Array.of(0x22, 0xff, 0x22))).toBe('not UTF-8');
  });

  test('nests as deep as it may and no deeper', () => {
    const nest = (depth: number): string => '[{"a":'.repeat(depth / 2) + '1' + '}]'.repeat(depth / 2);
    expect(problem(nest(MAX_JSON_DEPTH))).toBeNull();
    expect(problem(nest(MAX_JSON_DEPTH + 2))).toBe(`nested deeper than ${MAX_JSON_DEPTH}`);
    expect(problem('['.repeat(4_000_000))).toBe(`nested deeper than ${MAX_JSON_DEPTH}`);
  });
});
