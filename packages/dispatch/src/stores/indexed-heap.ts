/** Members of a heap know where they are in it, so that one can be moved or taken out. */
export interface HeapMember {
  /** The heap's own; -1 outside of it. A member can be in one heap at a time. */
  heapAt: number;
}

/** A binary heap whose members may change their place in the order, as long as {@link IndexedHeap.moved} is told. */
export class IndexedHeap<M extends HeapMember> {
  readonly #before: (a: M, b: M) => boolean;
  readonly #members: M[] = [];

  constructor(before: (a: M, b: M) => boolean) {
    this.#before = before;
  }

  get size(): number {
    return this.#members.length;
  }

  /** The first in the order. */
  get first(): M | undefined {
    return this.#members[0];
  }

  /** Takes up one that is in no heap. */
  add(member: M): void {
    member.heapAt = this.#members.length;
    this.#members.push(member);
    this.#up(member);
  }

  /** Takes out one that is in this heap. */
  remove(member: M): void {
    const at = member.heapAt;
    const last = this.#members.pop();
    member.heapAt = -1;
    if (last === undefined || last === member) return;
    this.#members[at] = last;
    last.heapAt = at;
    this.moved(last);
  }

  /** The member's place in the order may be another than it was. */
  moved(member: M): void {
    this.#up(member);
    this.#down(member);
  }

  #up(member: M): void {
    let at = member.heapAt;
    while (at > 0) {
      const parent = this.#members[(at - 1) >> 1];
      if (parent === undefined || !this.#before(member, parent)) break;
      this.#put(parent, at);
      at = (at - 1) >> 1;
    }
    this.#put(member, at);
  }

  #down(member: M): void {
    let at = member.heapAt;
    for (;;) {
      const left = this.#members[2 * at + 1];
      const right = this.#members[2 * at + 2];
      const child = left !== undefined && right !== undefined && this.#before(right, left) ? right : left;
      if (child === undefined || !this.#before(child, member)) break;
      const next = child.heapAt;
      this.#put(child, at);
      at = next;
    }
    this.#put(member, at);
  }

  #put(member: M, at: number): void {
    this.#members[at] = member;
    member.heapAt = at;
  }
}
