/**
 * Which ready tasks a node is given: domains take turns (`turns.ts`), and within a domain the first by priority, then age, of
 * all lanes that are open. Synchronous; the caller brings the transaction.
 *
 * A task that the node is large enough for and has no room for now is overtaken by those behind it for {@link OVERTAKING_MS}.
 * After that, when its turn comes, the node is given nothing more until there is room for it.
 */
import { OVERTAKING_MS } from './fitting.ts';
import type { Usage } from './fitting.ts';
import { IndexedHeap } from './indexed-heap.ts';
import { isOpen } from './sqlite-lanes.ts';
import type { Lane, Range, Shelf } from './sqlite-lanes.ts';
import type { Ledger } from './sqlite-ledger.ts';
import type { Queue } from './sqlite-queues.ts';

/** A task that may be leased. */
export interface Pick {
  readonly seq: number;
  readonly range: Readonly<Range>;
}

export interface Picks {
  /** They have left their lanes, and count as held of their keys and as taken of the node. */
  readonly picks: readonly Pick[];
  /** Something was left for lack of room. */
  readonly noRoom: boolean;
  /** One of those waits so long that the node is to take nothing else. */
  readonly heldBack: boolean;
}

/** Takes up to `want` ready tasks out of these queues. `usage`: what the node has taken, if it says what it has. */
export function pickTasks(
  ledger: Ledger,
  queues: readonly Queue[],
  want: number,
  usage: Usage | null,
): Picks {
  return new Picking(ledger, want, usage).run(queues);
}

/** The tasks of a domain in the queues asked for. */
interface Line {
  readonly domainId: string;
  readonly places: Place[];
  pass: number;
  heapAt: number;
}

/** A domain whose turn may be among the next. */
interface Candidate {
  domainId: string;
  pass: number;
  heapAt: number;
}

interface Place {
  readonly shelf: Shelf;
  /** Of the lane without a key. */
  plain: Front | null;
}

class Picking {
  readonly #ledger: Ledger;
  readonly #want: number;
  readonly #usage: Usage | null;
  readonly #picks: Pick[] = [];
  readonly #fronts: Front[] = [];
  readonly #keyed = new Map<Lane, Front>();
  /** Lanes of which nothing is left but what nobody may have; out of their heaps for as long as this takes. */
  readonly #aside: Lane[] = [];
  /** Ranges that each lane without a key is asked for at first. */
  #step = 1;
  #noRoom = false;
  #heldBack = false;

  constructor(ledger: Ledger, want: number, usage: Usage | null) {
    this.#ledger = ledger;
    this.#want = want;
    this.#usage = usage;
  }

  run(queues: readonly Queue[]): Picks {
    const places = queues.reduce((sum, { active }) => sum + active.size, 0);
    // However many lanes there are, little more is read than is given out.
    this.#step = Math.max(1, Math.ceil(this.#want / Math.max(1, places)));
    try {
      if (places === 1) this.#serveOnly(queues);
      else this.#serveInTurn(queues);
      for (const front of this.#fronts) front.take();
    } finally {
      for (const lane of this.#aside) {
        if (lane.ready > 0 && lane.heapAt === -1 && isOpen(lane)) lane.shelf.keyed.add(lane);
      }
    }
    return { picks: this.#picks, noRoom: this.#noRoom, heldBack: this.#heldBack };
  }

  #serveOnly(queues: readonly Queue[]): void {
    for (const { active } of queues) {
      for (const shelf of active) {
        const line: Line = {
          domainId: shelf.domainId,
          places: [{ shelf, plain: null }],
          pass: 0,
          heapAt: -1,
        };
        while (this.#picks.length < this.#want && this.#pickOf(line));
        const { turns } = this.#ledger.domains;
        if (this.#picks.length > 0) turns.charge(line.domainId, this.#weight(line), this.#picks.length);
        return;
      }
    }
  }

  #serveInTurn(queues: readonly Queue[]): void {
    const { turns } = this.#ledger.domains;
    const lines = new Map<string, Line>();
    const over = new Set<string>();
    // Of ten thousand domains only those need to be put in order whose turn can come. Each task takes one of them at most, and
    // so does each domain that turns out to have nothing for this node; when those were more than expected, it is done again.
    for (let most = 2 * this.#want + 16; ; most *= 4) {
      const waiting = this.#firstLines(queues, most, lines, over);
      let spare = waiting.size < most ? Infinity : most - (this.#want - this.#picks.length);
      while (spare >= 0) {
        const line = waiting.first;
        if (!line || this.#picks.length === this.#want) return;
        if (this.#pickOf(line)) {
          turns.charge(line.domainId, this.#weight(line));
          line.pass = turns.pass(line.domainId);
          waiting.moved(line);
          continue;
        }
        if (this.#heldBack) return;
        waiting.remove(line);
        over.add(line.domainId);
        spare -= 1;
      }
    }
  }

  /** The lines of up to `most` domains, those whose turn comes first. `lines`: those made before; `over`: not these. */
  #firstLines(
    queues: readonly Queue[],
    most: number,
    lines: Map<string, Line>,
    over: ReadonlySet<string>,
  ): IndexedHeap<Line> {
    const { turns } = this.#ledger.domains;
    const latest = new IndexedHeap<Candidate>((a, b) => hasTurnBefore(b, a));
    const seen = queues.length > 1 ? new Set<string>() : null;
    for (const { active } of queues) {
      for (const { domainId } of active) {
        if (over.has(domainId) || seen?.has(domainId) === true) continue;
        seen?.add(domainId);
        const pass = turns.pass(domainId);
        const last = latest.first;
        if (last === undefined || latest.size < most) latest.add({ domainId, pass, heapAt: -1 });
        else if (hasTurnBefore({ domainId, pass }, last)) {
          last.domainId = domainId;
          last.pass = pass;
          latest.moved(last);
        }
      }
    }
    const waiting = new IndexedHeap<Line>(hasTurnBefore);
    for (let { first } = latest; first !== undefined; first = latest.first) {
      latest.remove(first);
      const { domainId, pass } = first;
      const line = lines.get(domainId) ?? { domainId, places: placesOf(queues, domainId), pass, heapAt: -1 };
      lines.set(domainId, line);
      line.pass = pass;
      waiting.add(line);
    }
    return waiting;
  }

  #weight({ domainId }: Line): number {
    return this.#ledger.domains.weight(domainId);
  }

  /** Picks the first task of a domain that there is room for. False: there is none, or it is held back. */
  #pickOf(line: Line): boolean {
    for (;;) {
      let at = -1;
      let best: Front | null = null;
      for (const [index, place] of line.places.entries()) {
        const front = this.#first(place);
        if (front?.head == null || (best?.head != null && !comesBefore(front.head, best.head))) continue;
        best = front;
        at = index;
      }
      if (best?.head == null) return false;
      const { range } = best.head;
      const { queue } = range.lane.shelf;
      if (this.#usage !== null && this.#usage.shortage(queue.resources) !== null) {
        this.#noRoom = true;
        if (this.#ledger.now - range.since >= OVERTAKING_MS) {
          this.#heldBack = true;
          return false;
        }
        // Nothing of this queue fits, and there is no more room later.
        line.places.splice(at, 1);
        continue;
      }
      this.#pick(best, best.head);
      return true;
    }
  }

  #pick(front: Front, head: Pick): void {
    const { lanes } = this.#ledger;
    const { lane, priority } = head.range;
    front.next();
    this.#picks.push(head);
    if (lane.key !== null) {
      lanes.begins(lane, priority, head.seq + 1);
      lanes.holdKey(lane.key, 1);
    }
    this.#usage?.add(lane.shelf.queue.resources);
  }

  /** Where the first of a place's tasks is that may be leased. */
  #first(place: Place): Front | null {
    const { shelf } = place;
    if (place.plain === null && shelf.plain !== null && shelf.plain.ready > 0) {
      place.plain = this.#front(shelf.plain, this.#step);
    }
    const keyed = shelf.keyed.size === 0 ? null : this.#firstKeyed(shelf);
    const { plain } = place;
    if (plain?.head == null) return keyed;
    return keyed?.head != null && comesBefore(keyed.head, plain.head) ? keyed : plain;
  }

  #firstKeyed({ keyed }: Shelf): Front | null {
    for (;;) {
      const lane = keyed.first;
      if (!lane) return null;
      let front = this.#keyed.get(lane);
      if (!front) {
        front = this.#front(lane, 1);
        this.#keyed.set(lane, front);
      }
      const { head } = front;
      if (head === null) {
        keyed.remove(lane);
        this.#aside.push(lane);
        continue;
      }
      // Where a lane begins is known to be no earlier than it says. This one may begin after another does.
      this.#ledger.lanes.begins(lane, head.range.priority, head.seq);
      if (keyed.first === lane) return front;
    }
  }

  #front(lane: Lane, step: number): Front {
    const front = new Front(this.#ledger, lane, step);
    this.#fronts.push(front);
    return front;
  }
}

function placesOf(queues: readonly Queue[], domainId: string): Place[] {
  return queues.flatMap(({ shelves }): Place[] => {
    const shelf = shelves.get(domainId);
    return shelf === undefined || shelf.open === 0 ? [] : [{ shelf, plain: null }];
  });
}

function hasTurnBefore(a: Omit<Candidate, 'heapAt'>, b: Omit<Candidate, 'heapAt'>): boolean {
  return a.pass < b.pass || (a.pass === b.pass && a.domainId < b.domainId);
}

function comesBefore(a: Pick, b: Pick): boolean {
  const byPriority = a.range.priority - b.range.priority;
  return byPriority > 0 || (byPriority === 0 && a.seq < b.seq);
}

/** The ready tasks of one lane in their order, read a few ranges at a time, and twice as many each time. */
class Front {
  readonly #ledger: Ledger;
  readonly #lane: Lane;
  #step: number;
  #ranges: readonly Readonly<Range>[] = [];
  #read = 0;
  #at = 0;
  /** Fewer ranges came than were asked for: there are no more. */
  #all = false;
  /** What was picked so far, by range. */
  readonly #picked: { readonly range: Readonly<Range>; readonly seqs: number[] }[] = [];
  /** Undefined: not looked for yet. */
  #head: Pick | null | undefined;
  #range: Readonly<Range> | undefined;
  #nextSeq = 0;

  constructor(ledger: Ledger, lane: Lane, step: number) {
    this.#ledger = ledger;
    this.#lane = lane;
    this.#step = step;
  }

  /** The first that was not picked; null: there is none. */
  get head(): Pick | null {
    if (this.#head === undefined) this.#head = this.#find();
    return this.#head;
  }

  /** Picks the head. */
  next(): void {
    const { head } = this;
    if (head === null) return;
    const last = this.#picked.at(-1);
    if (last?.range === head.range) last.seqs.push(head.seq);
    else this.#picked.push({ range: head.range, seqs: [head.seq] });
    this.#nextSeq = head.seq + 1;
    // Looked for only when it is asked for: the last of what is wanted has nothing after it.
    this.#head = undefined;
  }

  /** Takes what was picked out of the lane. */
  take(): void {
    for (const { range, seqs } of this.#picked) this.#ledger.lanes.take(range, seqs);
  }

  #find(): Pick | null {
    for (;;) {
      const range = this.#range;
      if (range) {
        for (let seq = this.#nextSeq; seq <= range.lastTask; seq += 1) {
          // A task past its deadline is not given out any more; the sweep will end it.
          const { deadlineAt } = this.#ledger.specs.get(seq).spec;
          if (deadlineAt !== null && deadlineAt <= this.#ledger.now) continue;
          return { seq, range };
        }
      }
      this.#range = this.#nextRange();
      if (!this.#range) return null;
      this.#nextSeq = this.#range.firstTask;
    }
  }

  #nextRange(): Readonly<Range> | undefined {
    if (this.#at === this.#ranges.length && !this.#all) {
      this.#ranges = this.#ledger.lanes.front(this.#lane, this.#step, this.#read);
      this.#all = this.#ranges.length < this.#step;
      this.#read += this.#step;
      this.#step *= 2;
      this.#at = 0;
    }
    return this.#ranges[this.#at++];
  }
}
