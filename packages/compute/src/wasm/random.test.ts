import * as fc from 'fast-check';
import { expect, test } from 'vitest';
import { DEFAULT_SEED } from '../limits.ts';
import { SeededBytes } from './random.ts';

test('the default seed gives the bytes of the reference, in however many reads', () => {
  const random = new SeededBytes();
  random.reset(DEFAULT_SEED);
  const [first, second] = [new Uint8Array(5), new Uint8Array(11)];
  random.next(first);
  random.next(second);
  expect(Buffer.concat([first, second]).toString('hex')).toBe('9d93beec087205511be70fec473bcff5');
});

test('any seed gives splitmix64, as 64-bit arithmetic has it', () => {
  const MASK = 2n ** 64n - 1n;
  fc.assert(
    fc.property(fc.bigInt({ min: 0n, max: MASK }), (seed) => {
      const random = new SeededBytes();
      random.reset(seed);
      const bytes = new Uint8Array(20);
      random.next(bytes);
      let state = seed;
      const expected = Array.from(bytes, () => {
        state = (state + 0x9e3779b97f4a7c15n) & MASK;
        let z = state;
        z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK;
        z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & MASK;
        return Number((z ^ (z >> 31n)) & 0xffn);
      });
      expect([...bytes]).toEqual(expected);
    }),
  );
});
