import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { expect, test } from 'vitest';
import { uuidV7 } from './ids.ts';

const SHAPE = /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;

test('an id has the shape of version 7 and its time in front', () => {
  const clock = new SimulatedClock({ startAt: 0x0123_4567_89ab });
  const id = uuidV7(clock, seededRandom(1))();
  expect(id).toMatch(SHAPE);
  expect(id.slice(0, 13)).toBe('01234567-89ab');
});

test('ids rise however many are made in a millisecond, and when the clock jumps back', () => {
  const clock = new SimulatedClock();
  const next = uuidV7(clock, seededRandom(2));
  const ids: string[] = [];
  for (let round = 0; round < 4; round += 1) {
    for (let count = 0; count < 10_000; count += 1) ids.push(next());
    clock.jumpWallClock(round % 2 === 0 ? -5000 : 20_000);
  }
  expect(ids.every((id) => SHAPE.test(id))).toBe(true);
  expect(ids).toEqual(ids.toSorted());
  expect(new Set(ids).size).toBe(ids.length);
});

test('the edges of the random source are in range', () => {
  for (const edge of [0, 1 - 2 ** -53]) {
    const next = uuidV7(new SimulatedClock(), () => edge);
    expect(next()).toMatch(SHAPE);
    expect(next()).toMatch(SHAPE);
  }
});

test('equal seeds give equal ids', () => {
  const make = () => uuidV7(new SimulatedClock(), seededRandom(5));
  const [one, two] = [make(), make()];
  for (let count = 0; count < 100; count += 1) expect(one()).toBe(two());
});
