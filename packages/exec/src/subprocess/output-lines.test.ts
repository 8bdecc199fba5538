import { describe, expect, test } from 'vitest';
import type { JsonObject, Logger } from '@millrace/runner';
import { OutputLines } from './output-lines.ts';

const MAX_LINE = 16 * 1024;

function lines(limitBytes: number): { output: OutputLines; said: [string, JsonObject | undefined][] } {
  const said: [string, JsonObject | undefined][] = [];
  const line = (message: string, fields?: JsonObject): void => void said.push([message, fields]);
  const log: Logger = { debug: line, info: line, warn: line, error: line, child: () => log };
  return { output: new OutputLines(limitBytes, log), said };
}

describe('output of a program', () => {
  test('becomes lines, wherever the writes were cut', () => {
    const { output, said } = lines(1000);
    for (const byte of Buffer.from('one\ntwö 😀\n\nlast')) output.write('stdout', Buffer.from([byte]));
    output.end();
    expect(said.map(([message]) => message)).toEqual(['one', 'twö 😀', 'last']);
  });

  test('a long line is broken between characters, whether or not it came whole', () => {
    const text = `x${'😀'.repeat(MAX_LINE)}`;
    for (const ending of ['', '\n']) {
      const { output, said } = lines(10 * MAX_LINE);
      output.write('stderr', Buffer.from(text + ending));
      output.end();
      expect(said.map(([message]) => message).join('')).toBe(text);
      expect(said).toHaveLength(3);
      expect(
        said.every(([message]) => message.length <= MAX_LINE && Buffer.from(message).toString() === message),
      ).toBe(true);
    }
  });
});
