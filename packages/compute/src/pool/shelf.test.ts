import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { expect, test } from 'vitest';
import { Shelf } from './shelf.ts';

const never = (): never => {
  throw new Error('it was there already');
};

test('what is on the shelf was made once, places do not touch', () => {
  const shelf = new Shelf();
  shelf.get(0, () => new Uint8Array([1, 2, 3]));
  shelf.get(7, () => new Uint8Array([4]));
  const other = new Shelf(shelf.shared);
  expect([...other.get(0, never)]).toEqual([1, 2, 3]);
  expect([...other.get(7, never)]).toEqual([4]);
});

test('threads that ask while it is made wait for it', async () => {
  const shelf = new Shelf();
  const asker = (byte: number): Worker =>
    new Worker(
      `const { parentPort, workerData } = require('node:worker_threads');
       import(workerData.module).then(({ Shelf }) => {
         let made = 0;
         const bytes = new Shelf(workerData.shared).get(3, () => { made += 1; return new Uint8Array(100_000).fill(workerData.byte); });
         parentPort.postMessage({ made, byte: bytes[99_999], length: bytes.length });
       });`,
      {
        eval: true,
        workerData: { module: new URL('./shelf.js', import.meta.url).href, shared: shelf.shared, byte },
      },
    );
  const answers = (await Promise.all([1, 2, 3].map(async (byte) => once(asker(byte), 'message')))).flat() as {
    readonly made: number;
    readonly byte: number;
    readonly length: number;
  }[];
  expect(answers.reduce((sum, one) => sum + one.made, 0)).toBe(1);
  expect(new Set(answers.map((one) => one.byte)).size).toBe(1);
  expect(answers.every((one) => one.length === 100_000)).toBe(true);
});

test('what does not fit is made by everybody who asks', () => {
  const shelf = new Shelf();
  const make = (): Uint8Array => new Uint8Array(5 * 1024 * 1024);
  expect(shelf.get(0, make)).toHaveLength(5 * 1024 * 1024);
  expect(shelf.get(0, make)).toHaveLength(5 * 1024 * 1024);
});

test('what could not be made is made by the next who asks', () => {
  const shelf = new Shelf();
  expect(() =>
    shelf.get(0, () => {
      throw new Error('not now');
    }),
  ).toThrow('not now');
  expect([...shelf.get(0, () => new Uint8Array([9]))]).toEqual([9]);
});

test('nobody waits for ever for a thread that was killed while making it', () => {
  const shelf = new Shelf(undefined, 1);
  shelf.get(0, () => {
    // The first is not done: to others this is as if it had died.
    expect([...new Shelf(shelf.shared, 1).get(0, () => new Uint8Array([2]))]).toEqual([2]);
    return new Uint8Array([1]);
  });
  expect([...shelf.get(0, never)]).toEqual([1]);
});
