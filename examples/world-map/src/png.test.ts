import { createCanvas, loadImage } from '@napi-rs/canvas';
import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { encodePng } from './png.ts';

async function encode(width: number, height: number, strips: readonly Uint8Array[]): Promise<Buffer> {
  const chunks: Uint8Array[] = [];
  const source = async function* (): AsyncGenerator<Uint8Array> {
    yield* strips;
  };
  for await (const chunk of encodePng(width, height, source())) chunks.push(chunk);
  return Buffer.concat(chunks);
}

describe('encodePng', () => {
  test('writes what another decoder reads back exactly, in whatever strips the rows come', async () => {
    const picture = fc
      .tuple(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 1, max: 9 }))
      .chain(([width, height]) =>
        fc.record({
          width: fc.constant(width),
          height: fc.constant(height),
          rgb: fc.uint8Array({ minLength: width * height * 3, maxLength: width * height * 3 }),
          cuts: fc.array(fc.integer({ min: 1, max: height })),
        }),
      );
    await fc.assert(
      fc.asyncProperty(picture, async ({ width, height, rgb, cuts }) => {
        const bounds = [...new Set([0, ...cuts, height])].toSorted((a, b) => a - b);
        const strips = bounds
          .slice(1)
          .map((end, index) => rgb.subarray(bounds[index]! * width * 3, end * width * 3));
        const image = await loadImage(await encode(width, height, strips));
        expect([image.width, image.height]).toEqual([width, height]);
        const context = createCanvas(width, height).getContext('2d');
        context.drawImage(image, 0, 0);
        const { data } = context.getImageData(0, 0, width, height);
        expect([...data].filter((_, index) => index % 4 < 3)).toEqual([...rgb]);
      }),
    );
  });

  test('refuses too few rows, too many, and half a row', async () => {
    await expect(encode(2, 2, [new Uint8Array(6)])).rejects.toThrow('PNG of 2 x 2: got only 1 rows');
    await expect(encode(2, 1, [new Uint8Array(12)])).rejects.toThrow(RangeError);
    await expect(encode(2, 2, [new Uint8Array(9)])).rejects.toThrow('got 9 bytes after 0 rows');
  });

  test('passes on the error of its source, and stops it when nobody reads on', async () => {
    const failing = async function* (): AsyncGenerator<Uint8Array> {
      yield new Uint8Array(3);
      throw new Error('tile is gone');
    };
    const drain = async (): Promise<void> => {
      for await (const chunk of encodePng(1, 2, failing())) expect(chunk.length).toBeGreaterThan(0);
    };
    await expect(drain()).rejects.toThrow('tile is gone');

    let ended = false;
    const long = async function* (): AsyncGenerator<Uint8Array> {
      try {
        for (let row = 0; row < 4096; row += 1)
          yield Uint8Array.from({ length: 3 * 1024 }, (_, i) => i * row);
      } finally {
        ended = true;
      }
    };
    const encoded = encodePng(1024, 4096, long());
    for (let chunks = 0; chunks < 3; chunks += 1) await encoded.next();
    await encoded.return(undefined);
    await expect.poll(() => ended).toBe(true);
  });
});
