import { describe, expect, test } from 'vitest';
import { MAX_LINE_BYTES, OutputLines } from './output-lines.ts';
import type { Note } from './protocol.ts';

function lines(limitBytes: number): { output: OutputLines; notes: Note[] } {
  const notes: Note[] = [];
  return { output: new OutputLines(limitBytes, (note) => notes.push(note)), notes };
}
const info = (message: string): Note => ({
  kind: 'log',
  level: 'info',
  message,
  fields: { stream: 'stdout' },
});

describe('output of a module', () => {
  test('becomes lines, wherever the writes were cut', () => {
    const { output, notes } = lines(1000);
    const bytes = Buffer.from('one\ntwö\r\n\nlast');
    for (const byte of bytes) output.write('stdout', Buffer.from([byte]));
    output.end();
    expect(notes).toEqual([info('one'), info('twö'), info('last')]);
  });

  test('stderr is told as warnings, and does not mix with stdout', () => {
    const { output, notes } = lines(1000);
    output.write('stdout', Buffer.from('out'));
    output.write('stderr', Buffer.from('err\n'));
    output.end();
    expect(notes).toEqual([
      { kind: 'log', level: 'warn', message: 'err', fields: { stream: 'stderr' } },
      info('out'),
    ]);
  });

  test('exactly the limit is kept, one byte more is dropped and told once', () => {
    const at = lines(10);
    at.output.write('stdout', Buffer.from('123456789\n'));
    at.output.end();
    expect(at.notes).toEqual([info('123456789')]);

    const past = lines(10);
    for (let i = 0; i < 3; i += 1) past.output.write('stdout', Buffer.from('12345\n'));
    past.output.end();
    past.output.end();
    expect(past.notes).toEqual([
      info('12345'),
      info('1234'),
      {
        kind: 'log',
        level: 'warn',
        message: 'output was cut: the limit logBytes is 10 bytes',
        fields: { limit: 'logBytes', value: 10, dropped_bytes: 8 },
      },
    ]);
  });

  test('a line without an end is broken', () => {
    const { output, notes } = lines(10 * MAX_LINE_BYTES);
    output.write('stdout', Buffer.alloc(2 * MAX_LINE_BYTES + 5, 'x'));
    expect(notes).toHaveLength(2);
    output.end();
    expect(notes.at(-1)).toEqual(info('xxxxx'));
  });

  test('a long line is broken between characters, whether or not it came whole', () => {
    const text = `x${'😀'.repeat(MAX_LINE_BYTES)}`;
    for (const ending of ['', '\n']) {
      const { output, notes } = lines(10 * MAX_LINE_BYTES);
      output.write('stdout', Buffer.from(text + ending));
      output.end();
      const messages = notes.map((note) => (note.kind === 'log' ? note.message : ''));
      expect(messages.join('')).toBe(text);
      expect(messages).toHaveLength(3);
      for (const message of messages) {
        expect(message.length).toBeLessThanOrEqual(MAX_LINE_BYTES);
        expect(Buffer.from(message).toString()).toBe(message);
      }
    }
  });
});
