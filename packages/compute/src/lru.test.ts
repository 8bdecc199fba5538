import { expect, test } from 'vitest';
import { Lru } from './lru.ts';

test('keeps what was used last, up to exactly its weight', () => {
  const lru = new Lru<number>(10);
  lru.set('a', 1, 4);
  lru.set('b', 2, 6);
  expect(lru.get('a')).toBe(1);
  expect(lru.weight).toBe(10);
  lru.set('c', 3, 1);
  expect(lru.get('b')).toBeUndefined();
  expect([lru.get('a'), lru.get('c')]).toEqual([1, 3]);
});

test('replacing an entry counts it once, and one heavier than all of it is not kept', () => {
  const lru = new Lru<number>(10);
  lru.set('a', 1, 9);
  lru.set('a', 2, 8);
  expect(lru.weight).toBe(8);
  lru.set('big', 3, 11);
  expect(lru.get('big')).toBeUndefined();
  expect(lru.get('a')).toBe(2);
  lru.delete('a');
  expect(lru.weight).toBe(0);
});
