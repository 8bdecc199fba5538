import { expect, test } from 'vitest';
import { demultiplex } from './raw-stream.ts';

function frame(kind: number, text: string, length = Buffer.byteLength(text)): Buffer {
  const header = Buffer.alloc(8);
  header[0] = kind;
  header.writeUInt32BE(length, 4);
  return Buffer.concat([header, Buffer.from(text)]);
}

async function read(
  bytes: Buffer,
  chunkBytes: number,
): Promise<{ stdout: string; stderr: string; largest: number }> {
  const result = { stdout: '', stderr: '', largest: 0 };
  async function* chunks(): AsyncGenerator<Uint8Array> {
    for (let at = 0; at < bytes.length; at += chunkBytes) yield bytes.subarray(at, at + chunkBytes);
  }
  for await (const { stream, bytes: piece } of demultiplex(chunks())) {
    result[stream] += Buffer.from(piece).toString('latin1');
    result.largest = Math.max(result.largest, piece.byteLength);
  }
  return result;
}

test.each([1, 3, 7, 8, 9, 1000])(
  'frames are told apart however they are cut: every %i bytes',
  async (chunkBytes) => {
    const bytes = Buffer.concat([
      frame(1, 'one'),
      frame(2, 'oops'),
      frame(1, ''),
      frame(0, 'two'),
      frame(1, 'three'),
    ]);
    expect(await read(bytes, chunkBytes)).toMatchObject({ stdout: 'onetwothree', stderr: 'oops' });
  },
);

test('a frame that claims four gigabytes is handed on as it arrives', async () => {
  const bytes = Buffer.concat([frame(1, 'x'.repeat(1000), 0xffff_ffff)]);
  expect(await read(bytes, 100)).toEqual({ stdout: 'x'.repeat(1000), stderr: '', largest: 100 });
});

test('a stream that ends in the middle of a header or a frame just ends', async () => {
  expect(await read(frame(1, 'whole').subarray(0, 5), 5)).toMatchObject({ stdout: '' });
  expect(await read(frame(1, 'whole').subarray(0, 10), 5)).toMatchObject({ stdout: 'wh' });
});

test('bytes that are no frames are refused', async () => {
  for (const bytes of [Buffer.from('HTTP/1.1 500'), frame(4, 'x')]) {
    await expect(read(bytes, 100)).rejects.toMatchObject({ code: 'data_loss' });
  }
});

test("the engine's error frame ends the stream with its words", async () => {
  await expect(read(Buffer.concat([frame(1, 'x'), frame(3, 'disk is broken')]), 9)).rejects.toMatchObject({
    code: 'unavailable',
    message: 'the engine ended the output stream: disk is broken',
  });
});
