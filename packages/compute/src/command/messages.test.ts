import { describe, expect, test } from 'vitest';
import { FrameReader, frame } from './messages.ts';

describe('frames of output', () => {
  const written = Buffer.concat([
    frame(1, Buffer.from('one ')),
    frame(2, Buffer.from('two')),
    frame(1, Buffer.alloc(0)),
    frame(1, Buffer.alloc(300, 'x')),
  ]);

  test('are read back however they were cut', () => {
    for (const size of [1, 2, 4, 5, 6, 7, 100, written.length]) {
      const heard = { stdout: '', stderr: '' };
      const reader = new FrameReader((stream, bytes) => {
        expect(bytes.length).toBeGreaterThan(0);
        heard[stream] += Buffer.from(bytes).toString();
      });
      for (let at = 0; at < written.length; at += size) reader.push(written.subarray(at, at + size));
      expect(heard).toEqual({ stdout: `one ${'x'.repeat(300)}`, stderr: 'two' });
    }
  });

  test('are passed on before they are complete', () => {
    const heard: string[] = [];
    new FrameReader((_stream, bytes) => heard.push(Buffer.from(bytes).toString())).push(
      written.subarray(0, 7),
    );
    expect(heard).toEqual(['on']);
  });
});
