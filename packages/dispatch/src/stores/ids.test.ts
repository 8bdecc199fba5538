import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { expect, test } from 'vitest';
import { LEASE_NUMBERS, leaseId, prefixOf, taskId, taskIdsOf, taskIndex, uuidV7 } from './ids.ts';

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

test("a task's id is made from its job's and tells its place in the job", () => {
  const next = uuidV7(new SimulatedClock(), seededRandom(6));
  // The second one's last part is so high that its tasks' ids go on from zero.
  for (const jobId of [next(), `${prefixOf(next())}fffffffe`]) {
    const ids = taskIdsOf(jobId);
    const tasks = Array.from({ length: 10_000 }, (_, index) => taskId(ids, index));
    expect(new Set([jobId, ...tasks]).size).toBe(10_001);
    for (const [index, id] of tasks.entries()) {
      expect(id).toMatch(SHAPE);
      expect(prefixOf(id)).toBe(prefixOf(jobId));
      expect(taskIndex(ids, id)).toBe(index);
    }
    expect(taskIndex(ids, jobId)).toBe(2 ** 32 - 1);
    expect(taskIndex(ids, 'no id at all')).toBe(Infinity);
  }
});

test("a lease's id is made from its time and number, and no two of these make the same", () => {
  const times = [0, 1, 0x0123_4567_89ab];
  const numbers = [0, 1, 2 ** 16, 2 ** 32 - 1, 2 ** 32, LEASE_NUMBERS - 1];
  const ids = times.flatMap((at) => numbers.map((no) => leaseId(at, no)));
  expect(new Set(ids).size).toBe(times.length * numbers.length);
  for (const id of ids) expect(id).toMatch(SHAPE);
  expect(leaseId(0x0123_4567_89ab, 0xabcd_ef01)).toBe('01234567-89ab-7000-8000-0000abcdef01');
});
