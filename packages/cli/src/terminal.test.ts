import { describe, expect, test } from 'vitest';
import { paint, terminalFeatures } from './terminal.ts';

const terminal = { write: () => true, isTTY: true, columns: 120 };
const pipe = { write: () => true };

describe('a terminal', () => {
  test('has colour, is drawn over, and tells its width', () => {
    const features = terminalFeatures(terminal, {});
    expect([features.color, features.live, features.width()]).toEqual([true, true, 120]);
  });

  test('loses colour to NO_COLOR, which also beats FORCE_COLOR', () => {
    expect(terminalFeatures(terminal, { NO_COLOR: '1', FORCE_COLOR: '1' }).color).toBe(false);
    expect(terminalFeatures(terminal, { NO_COLOR: '' }).color).toBe(true);
  });

  test('that is dumb has neither', () => {
    const features = terminalFeatures(terminal, { TERM: 'dumb' });
    expect([features.color, features.live]).toEqual([false, false]);
  });

  test('in CI is not drawn over', () => {
    expect(terminalFeatures(terminal, { CI: 'true' }).live).toBe(false);
  });
});

describe('a pipe', () => {
  test('has neither colour nor redrawing, and 80 columns', () => {
    const features = terminalFeatures(pipe, {});
    expect([features.color, features.live, features.width()]).toEqual([false, false, 80]);
  });

  test('takes its width from COLUMNS', () => {
    expect(terminalFeatures(pipe, { COLUMNS: '100' }).width()).toBe(100);
    expect(terminalFeatures(pipe, { COLUMNS: 'wide' }).width()).toBe(80);
  });

  test('has colour when FORCE_COLOR asks for it', () => {
    expect(terminalFeatures(pipe, { FORCE_COLOR: '1' }).color).toBe(true);
    expect(terminalFeatures(pipe, { FORCE_COLOR: '0' }).color).toBe(false);
  });
});

test('painting without colour changes nothing', () => {
  expect(paint(false).red('x')).toBe('x');
  expect(paint(true).red('x')).toBe('\u001b[31mx\u001b[39m');
  expect(paint(true).red('')).toBe('');
});
