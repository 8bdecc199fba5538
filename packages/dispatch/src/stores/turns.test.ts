import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MAX_WEIGHT } from '../records.ts';
import { Turns, checkWeight } from './turns.ts';

function serve(turns: Turns, weights: Readonly<Record<string, number>>, count: number): string {
  let given = '';
  for (let task = 0; task < count; task += 1) {
    const domain = turns.next(Object.keys(weights)) ?? '';
    turns.charge(domain, weights[domain] ?? 1);
    given += domain;
  }
  return given;
}

describe('turns', () => {
  test('domains of one weight alternate, the least id first', () => {
    expect(serve(new Turns(), { c: 1, a: 1, b: 1 }, 7)).toBe('abcabca');
  });

  test('nobody waits: nobody is next', () => {
    expect(new Turns().next([])).toBeNull();
  });

  test('weights 1 and 3 are one to three in every round', () => {
    expect(serve(new Turns(), { a: 1, b: 3 }, 16)).toBe('abbbabbbabbbabbb');
  });

  test('over whole rounds every domain has exactly its weight, whatever the weights', () => {
    const weight = fc.oneof(fc.integer({ min: 1, max: 12 }), fc.integer({ min: 1, max: MAX_WEIGHT }));
    fc.assert(
      fc.property(
        fc.array(weight, { minLength: 1, maxLength: 5 }),
        fc.integer({ min: 1, max: 3 }),
        (all, rounds) => {
          const weights = Object.fromEntries(
            all.map((value, index) => [String.fromCharCode(97 + index), value]),
          );
          const given = serve(new Turns(), weights, rounds * all.reduce((sum, value) => sum + value, 0));
          for (const [name, value] of Object.entries(weights)) {
            expect(given.split(name).length - 1).toBe(rounds * value);
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  test('whoever waits all the time is never more than a round behind', () => {
    fc.assert(
      fc.property(fc.array(fc.subarray(['b', 'c', 'd', 'e']), { minLength: 30, maxLength: 80 }), (others) => {
        const turns = new Turns();
        let waited = 0;
        for (const some of others) {
          const next = turns.next(['a', ...some]) ?? '';
          turns.charge(next, 1);
          waited = next === 'a' ? 0 : waited + 1;
          expect(waited).toBeLessThanOrEqual(4);
        }
      }),
      { numRuns: 100 },
    );
  });

  test('a domain that was idle, or new, comes in where the others are', () => {
    const turns = new Turns();
    serve(turns, { a: 1 }, 1000);
    expect(serve(turns, { a: 1, b: 1 }, 9)).toMatch(/^b?(?:ab|ba)+a?$/);
    serve(turns, { b: 1 }, 1000);
    expect(serve(turns, { a: 1, b: 1 }, 9)).toMatch(/^a?(?:ab|ba)+b?$/);
  });

  test('many tasks at once count like as many one by one', () => {
    const [one, other] = [new Turns(), new Turns()];
    for (let task = 0; task < 10; task += 1) one.charge('a', 3);
    other.charge('a', 3, 10);
    expect(other.pass('a')).toBe(one.pass('a'));
    expect(other.pass('never heard of')).toBe(one.pass('never heard of'));
  });

  test('a new weight counts from the next turn on', () => {
    const turns = new Turns();
    serve(turns, { a: 1, b: 1 }, 10);
    expect(serve(turns, { a: 2, b: 1 }, 9)).toBe('abaabaaba');
  });

  test('domains that are not ahead are forgotten, so memory does not grow with those that were ever there', () => {
    const turns = new Turns();
    for (let domain = 0; domain < 100_000; domain += 1) {
      turns.charge(`d${domain}`, 1);
      turns.charge('always there', 1);
    }
    expect(turns.size).toBeLessThan(1000);
  });

  test('a weight is a whole number from 1 to 1000', () => {
    checkWeight(1);
    checkWeight(MAX_WEIGHT);
    for (const weight of [0, MAX_WEIGHT + 1, 1.5, -1, Number.NaN, Infinity]) {
      expect(() => checkWeight(weight)).toThrow(`must be an integer from 1 to 1000, got ${weight}`);
    }
  });
});
