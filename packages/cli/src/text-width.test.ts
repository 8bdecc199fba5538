import { describe, expect, test } from 'vitest';
import { fitWidth, oneLine, padWidth, table, textWidth } from './text-width.ts';

describe('textWidth', () => {
  test.each([
    ['', 0],
    ['plain ascii', 11],
    ['日本語', 6],
    ['e\u0301', 1],
    ['👍', 2],
    ['👩‍💻', 2],
    ['한글', 4],
    ['\u001b[31mred\u001b[39m', 3],
    ['█░', 2],
  ])('%j takes %d columns', (text, width) => {
    expect(textWidth(text)).toBe(width);
  });
});

describe('oneLine', () => {
  test('takes escape sequences out of foreign text', () => {
    expect(oneLine('\u001b[2Jgone\u001b]0;title\u0007 here')).toBe('gone here');
  });

  test('replaces control and direction characters by spaces', () => {
    expect(oneLine('a\nb\tc\u202ed\r')).toBe('a b c d');
  });
});

describe('fitWidth', () => {
  test('leaves text that fits exactly', () => {
    expect(fitWidth('12345', 5)).toBe('12345');
  });

  test('cuts one column past the width, with an ellipsis inside it', () => {
    expect(fitWidth('123456', 5)).toBe('1234…');
  });

  test('never splits a wide character', () => {
    expect(fitWidth('日本語', 4)).toBe('日…');
    expect(textWidth(fitWidth('日本語', 4))).toBeLessThanOrEqual(4);
  });

  test('is empty without room', () => {
    expect(fitWidth('abc', 0)).toBe('');
  });
});

test('padWidth fills by columns on the side asked for', () => {
  expect(padWidth('日', 4)).toBe('日  ');
  expect(padWidth('7', 3, 'left')).toBe('  7');
  expect(padWidth('long', 2)).toBe('long');
});

test('a table aligns its columns by display width', () => {
  expect(
    table(
      [{ title: 'NAME' }, { title: 'N', align: 'right' }, { title: 'END' }],
      [
        ['日本', '5', 'x'],
        ['b', '10', ''],
      ],
    ),
  ).toEqual(['NAME   N  END', '日本   5  x', 'b     10']);
});
