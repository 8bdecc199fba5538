import * as fc from 'fast-check';
import { expect, test } from 'vitest';
import { LineSplitter } from './line-splitter.ts';

function split(text: string, maxBytes: number, pieceBytes: number): string[] {
  const lines: string[] = [];
  const splitter = new LineSplitter(maxBytes, (line) => lines.push(line));
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length; at += pieceBytes) splitter.write(bytes.subarray(at, at + pieceBytes));
  splitter.end();
  return lines;
}

test('lines are the same however the bytes are cut', () => {
  fc.assert(
    fc.property(
      fc.array(fc.constantFrom('a', 'é', '\n', 'bc')),
      fc.integer({ min: 1, max: 9 }),
      (parts, size) => {
        const text = parts.join('');
        const lines = text.split('\n');
        if (lines.at(-1) === '') lines.pop();
        expect(split(text, 1_000, size)).toEqual(lines);
      },
    ),
  );
});

test('a line at the limit is one, and one byte more makes two', () => {
  expect(split('abcd\ne', 4, 3)).toEqual(['abcd', 'e']);
  expect(split('abcde\nf', 4, 3)).toEqual(['abcd', 'e', 'f']);
});
