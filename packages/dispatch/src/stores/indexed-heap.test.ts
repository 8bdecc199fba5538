import fc from 'fast-check';
import { expect, test } from 'vitest';
import { IndexedHeap } from './indexed-heap.ts';

interface Member {
  value: number;
  heapAt: number;
}

test('whatever is added, changed and taken out, the first is the least of those inside', () => {
  const action = fc.record({
    kind: fc.constantFrom('add', 'add', 'remove', 'change'),
    pick: fc.nat({ max: 1000 }),
    value: fc.integer({ min: 0, max: 50 }),
  });
  fc.assert(
    fc.property(fc.array(action, { maxLength: 120 }), (actions) => {
      const heap = new IndexedHeap<Member>((a, b) => a.value < b.value);
      const inside: Member[] = [];
      for (const { kind, pick, value } of actions) {
        const at = pick % Math.max(1, inside.length);
        const member = inside[at];
        if (kind === 'add') {
          const added = { value, heapAt: -1 };
          heap.add(added);
          inside.push(added);
        } else if (member && kind === 'remove') {
          heap.remove(member);
          inside.splice(at, 1);
          expect(member.heapAt).toBe(-1);
        } else if (member) {
          member.value = value;
          heap.moved(member);
        }
        expect(heap.size).toBe(inside.length);
        expect(heap.first?.value).toBe(
          inside.length === 0 ? undefined : Math.min(...inside.map((each) => each.value)),
        );
      }
      const drained: number[] = [];
      for (let { first } = heap; first !== undefined; first = heap.first) {
        drained.push(first.value);
        heap.remove(first);
      }
      expect(drained).toEqual(inside.map((each) => each.value).toSorted((a, b) => a - b));
    }),
    { numRuns: 300 },
  );
});
