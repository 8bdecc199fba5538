import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { FrameDecoder, encodeFrame, encodeLength } from './frames.ts';

function decode(chunks: readonly Uint8Array[], maxFrameBytes?: number): string[] {
  const decoder = new FrameDecoder(maxFrameBytes);
  const found: string[] = [];
  for (const chunk of chunks)
    decoder.push(chunk, (payload) => found.push(Buffer.from(payload).toString('hex')));
  decoder.end();
  return found;
}

const hex = (text: string): Uint8Array => Buffer.from(text.replaceAll(' ', ''), 'hex');

describe('the length before a frame', () => {
  test.each([
    [0, '00'],
    [11, '0b'],
    [127, '7f'],
    [128, '8001'],
    [300, 'ac02'],
    [65536, '808004'],
    [3000015, 'cf8db701'],
  ])('%d is %s', (length, expected) => {
    expect(Buffer.from(encodeLength(length)).toString('hex')).toBe(expected);
  });
});

describe('the frame decoder', () => {
  test('delivers frames of every size however the bytes are cut', () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 300 }), { maxLength: 8 }),
        fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 50 }),
        (payloads, cuts) => {
          const stream = Buffer.concat(payloads.map(encodeFrame));
          const chunks: Uint8Array[] = [];
          for (let at = 0, cut = 0; at < stream.length; cut += 1) {
            const size = cuts[cut % cuts.length]!;
            chunks.push(stream.subarray(at, at + size));
            at += size;
          }
          expect(decode(chunks)).toEqual(payloads.map((payload) => Buffer.from(payload).toString('hex')));
        },
      ),
      { numRuns: 200 },
    );
  });

  test('delivers frames under four bytes at once', () => {
    const found: number[] = [];
    const decoder = new FrameDecoder();
    const note = (payload: Uint8Array): number => found.push(payload.length);
    decoder.push(hex('00'), note);
    expect(found).toEqual([0]);
    decoder.push(hex('02 08 07'), note);
    expect(found).toEqual([0, 2]);
  });

  test('accepts a length with padding', () => {
    expect(decode([hex('83 00 01 02 03')])).toEqual(['010203']);
    expect(decode([hex('83 80 80 80 80 80 80 80 80 00 01 02 03')])).toEqual(['010203']);
    expect(decode([hex('80'), hex('00')])).toEqual(['']);
  });

  test('refuses a length of more than ten bytes', () => {
    expect(() => decode([hex('80 80 80 80 80 80 80 80 80 80 00')])).toThrow(/length has more than 10 bytes/);
  });

  test('takes a frame at the limit and refuses one a byte larger before it arrives', () => {
    expect(decode([encodeFrame(new Uint8Array(100))], 100)).toHaveLength(1);
    const decoder = new FrameDecoder(100);
    expect(() => decoder.push(encodeLength(101), () => undefined)).toThrow(
      /announces 101 bytes, above the limit maxFrameBytes of 100/,
    );
  });

  test.each([
    ['4 GiB', '80 80 80 80 10'],
    ['2^64-1', 'ff ff ff ff ff ff ff ff ff 01'],
  ])('refuses a length of %s, whether it comes whole or byte by byte', (_name, prefix) => {
    expect(() => decode([hex(prefix)])).toThrow(/above the limit maxFrameBytes of 16777216/);
    expect(() => decode([...hex(prefix)].map((byte) => Uint8Array.of(byte)))).toThrow(/above the limit/);
  });

  test('keeps memory near what has arrived, not what was announced', () => {
    const decoder = new FrameDecoder();
    const before = process.memoryUsage().arrayBuffers;
    decoder.push(encodeLength(16 * 1024 * 1024), () => undefined);
    for (let index = 0; index < 100_000; index += 1) decoder.push(Uint8Array.of(1), () => undefined);
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(8 * 1024 * 1024);
    expect(() => decoder.end()).toThrow(/ended in the middle of a frame/);
  });

  test('hands over the frames before a bad one', () => {
    const found: number[] = [];
    const decoder = new FrameDecoder(10);
    expect(() => decoder.push(hex('01 aa 02 aa bb 0b'), (payload) => found.push(payload.length))).toThrow(
      /maxFrameBytes/,
    );
    expect(found).toEqual([1, 2]);
  });

  test.each(['8b', '0b 08', '05'])('says that a stream ending after %s cuts a frame', (bytes) => {
    expect(() => decode([hex(bytes)])).toThrow(/middle of a frame/);
  });
});
