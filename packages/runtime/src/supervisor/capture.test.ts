import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { CAPTURE_ALL, CAPTURE_NOTHING, ChunkText, OutputCapture, type CaptureMode } from './capture.ts';

function capture(mode: CaptureMode, chunks: readonly (string | Uint8Array)[], limit = 1_000): OutputCapture {
  const output = new OutputCapture(mode, limit);
  for (const chunk of chunks) output.push(Buffer.from(chunk));
  return output;
}

describe('a capture', () => {
  test.each<[string, CaptureMode, string | null]>([
    ['nothing', CAPTURE_NOTHING, null],
    ['all', CAPTURE_ALL, '0123456789'],
    ['the head', { keep: 'head', bytes: 3, stream: false, format: 'str' }, '012'],
    ['the tail', { keep: 'tail', bytes: 3, format: 'str' }, '789'],
    ['both ends, the head having the odd byte', { keep: 'headTail', bytes: 5, format: 'str' }, '01289'],
    ['short output once, with both ends', { keep: 'headTail', bytes: 20, format: 'str' }, '0123456789'],
    ['no bytes of the tail', { keep: 'tail', bytes: 0, format: 'str' }, null],
  ])('keeps %s', (_name, mode, expected) => {
    for (const chunks of [['0123456789'], ['0', '12345', '6789'], '0123456789'.split('')]) {
      const result = capture(mode, chunks).result();
      expect(result).toMatchObject({ value: expected, totalBytes: 10, truncated: false });
    }
  });

  test('keeps exactly what it should of any chunks', () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 20 }), { maxLength: 400 }),
        fc.nat(300),
        fc.constantFrom('head', 'tail', 'headTail'),
        (chunks, bytes, keep) => {
          const mode = { keep, bytes, stream: false, format: 'bin' } as CaptureMode;
          const all = Buffer.concat(chunks);
          const tail = keep === 'tail' ? bytes : keep === 'headTail' ? Math.floor(bytes / 2) : 0;
          const head = bytes - tail;
          const expected =
            all.length <= bytes
              ? all
              : Buffer.concat([all.subarray(0, head), all.subarray(all.length - tail)]);
          expect(Buffer.from(capture(mode, chunks).result().bytes)).toEqual(expected);
        },
      ),
      { numRuns: 100 },
    );
  });

  test('is cut by the limit of the supervisor, which is told, and only past it', () => {
    expect(capture(CAPTURE_ALL, ['x'.repeat(100)], 100).result()).toMatchObject({ truncated: false });
    expect(capture(CAPTURE_ALL, ['x'.repeat(101)], 100).result()).toMatchObject({
      truncated: true,
      totalBytes: 101,
      value: 'x'.repeat(100),
    });
  });

  test('is text where it is UTF-8, else a character per byte, and bytes when asked for', () => {
    expect(capture(CAPTURE_ALL, ['zażółć']).result().value).toBe('zażółć');
    expect(capture(CAPTURE_ALL, [Uint8Array.of(0x68, 0xff)]).result().value).toBe('hÿ');
    const binary: CaptureMode = { keep: 'head', bytes: null, stream: false, format: 'bin' };
    expect(capture(binary, [Uint8Array.of(1, 255)]).result().value).toEqual([1, 255]);
  });
});

test('chunks of text cut no character in two', () => {
  const text = new ChunkText();
  const bytes = Buffer.from('aż€');
  expect([...bytes].map((byte) => text.push(Uint8Array.of(byte))).join('')).toBe('aż€');
});
