import type { Random } from '../clock.ts';

/**
 * Random numbers that repeat: the generator sfc32 (Small Fast Chaotic, by Chris Doty-Humphrey, of PractRand), seeded
 * the way PractRand seeds it. Equal seeds give equal sequences on every machine and in every version, so a seed in
 * a test report can be run again. Not for secrets.
 *
 * @param seed an integer JavaScript can hold exactly; all its bits count.
 * @throws RangeError for any other seed
 */
export function seededRandom(seed: number): Random {
  if (!Number.isSafeInteger(seed))
    throw new RangeError(`seededRandom: seed must be a safe integer, got ${seed}`);
  let a = seed | 0;
  let b = Math.floor(seed / 2 ** 32) | 0;
  let c = 0;
  let counter = 1;
  const next = (): number => {
    const result = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + result) | 0;
    return (result >>> 0) / 2 ** 32;
  };
  for (let round = 0; round < 12; round += 1) next();
  return next;
}
