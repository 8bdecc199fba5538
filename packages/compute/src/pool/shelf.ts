/**
 * Bytes that one guest worker makes and all others of its pool use, those that come later included: what an engine would
 * otherwise work out anew in each worker, also in every one that replaces a killed one.
 */
import { workerData } from 'node:worker_threads';

/** Places on the shelf, and their bytes in all. Memory that nobody writes to costs nothing. */
const PLACES = 8;
const CAPACITY = 4 * 1024 * 1024;
/** 32-bit cells of each place, behind one for the end of what is taken. */
const STATE = 0;
const OFFSET = 1;
const LENGTH = 2;
const CELLS = 3;
const HEADER_BYTES = 4 * (1 + PLACES * CELLS);
const EMPTY = 0;
const BEING_MADE = 1;
const READY = 2;
/** Whoever makes it may be killed meanwhile; then it is made again by everybody who waited. */
const PATIENCE_MS = 10_000;

export class Shelf {
  readonly shared: SharedArrayBuffer;
  readonly #cells: Int32Array;
  readonly #patienceMs: number;

  constructor(shared = new SharedArrayBuffer(HEADER_BYTES + CAPACITY), patienceMs = PATIENCE_MS) {
    this.shared = shared;
    this.#patienceMs = patienceMs;
    this.#cells = new Int32Array(shared, 0, HEADER_BYTES / 4);
  }

  /** What is at a place, 0 to 7; made and put there by whoever asks first. The bytes are shared: nobody may change them. */
  get(place: number, make: () => Uint8Array): Uint8Array {
    const cells = this.#cells;
    const at = 1 + place * CELLS;
    if (Atomics.compareExchange(cells, at + STATE, EMPTY, BEING_MADE) === EMPTY) {
      let state = EMPTY;
      try {
        const made = make();
        if (this.#put(at, made)) state = READY;
        return made;
      } finally {
        Atomics.store(cells, at + STATE, state);
        Atomics.notify(cells, at + STATE);
      }
    }
    Atomics.wait(cells, at + STATE, BEING_MADE, this.#patienceMs);
    if (Atomics.load(cells, at + STATE) !== READY) return make();
    return new Uint8Array(this.shared, HEADER_BYTES + (cells[at + OFFSET] ?? 0), cells[at + LENGTH] ?? 0);
  }

  #put(at: number, bytes: Uint8Array): boolean {
    const cells = this.#cells;
    const offset = Atomics.add(cells, 0, bytes.length);
    if (offset + bytes.length > CAPACITY) {
      Atomics.sub(cells, 0, bytes.length);
      return false;
    }
    new Uint8Array(this.shared, HEADER_BYTES + offset, bytes.length).set(bytes);
    cells[at + OFFSET] = offset;
    cells[at + LENGTH] = bytes.length;
    return true;
  }
}

/** The shelf of the pool this thread works for; outside of one, a shelf of its own. */
export function poolShelf(): Shelf {
  const { shelf } = (workerData ?? {}) as { readonly shelf?: SharedArrayBuffer };
  return new Shelf(shelf);
}
