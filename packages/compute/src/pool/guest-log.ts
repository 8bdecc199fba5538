/**
 * A guest's diagnostics on their way to the caller: cut off at a limit and counted on, beginning and end kept for error
 * texts, and sent as they come unless they come in a flood. A line written just before a guest spins for ever
 * is often the one that explains it, so nothing waits in here without need.
 */
const EXCERPT_BYTES = 512;
const BATCH_BYTES = 16 * 1024;
/** Messages sent at once; later ones, each 10 ms. */
const BURST = 64;
const REFILL_MS = 10;

export class GuestLog {
  readonly #send: (bytes: Uint8Array<ArrayBuffer>) => void;
  readonly #now: () => number;
  #maxBytes = 0;
  #bytes = 0;
  #pending: Uint8Array<ArrayBuffer> = new Uint8Array(0);
  #pendingLength = 0;
  #credits = BURST;
  #refilledAt = 0;
  #head: Uint8Array = new Uint8Array(0);
  readonly #tail = new Uint8Array(EXCERPT_BYTES);

  constructor(send: (bytes: Uint8Array<ArrayBuffer>) => void, now: () => number) {
    this.#send = send;
    this.#now = now;
  }

  begin(maxBytes: number): void {
    this.#maxBytes = maxBytes;
    this.#bytes = 0;
    this.#pendingLength = 0;
    this.#head = new Uint8Array(0);
  }

  /** All that was written. */
  get bytes(): number {
    return this.#bytes;
  }

  get droppedBytes(): number {
    return Math.max(0, this.#bytes - this.#maxBytes);
  }

  write(bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    const room = Math.max(0, this.#maxBytes - this.#bytes);
    this.#keep(bytes);
    this.#bytes += bytes.length;
    if (room === 0) return;
    this.#push(bytes.subarray(0, room));
    if (this.#pendingLength >= BATCH_BYTES || this.#credit()) this.flush();
  }

  flush(): void {
    if (this.#pendingLength === 0) return;
    this.#send(this.#pending.slice(0, this.#pendingLength));
    this.#pendingLength = 0;
  }

  /** All of it when it is short, else beginning and end: what went wrong is often said last. */
  excerpt(): string {
    const text = (part: Uint8Array): string => new TextDecoder().decode(part);
    if (this.#bytes <= EXCERPT_BYTES) return text(this.#head);
    const half = EXCERPT_BYTES / 2;
    const tail = new Uint8Array(half);
    for (let index = 0; index < half; index += 1) {
      tail[index] = this.#tail[(this.#bytes - half + index) % EXCERPT_BYTES] ?? 0;
    }
    return `${text(this.#head.subarray(0, half))} […${this.#bytes - EXCERPT_BYTES} bytes…] ${text(tail)}`;
  }

  #credit(): boolean {
    if (this.#credits === 0) {
      const now = this.#now();
      const gained = Math.floor((now - this.#refilledAt) / REFILL_MS);
      if (gained === 0) return false;
      this.#credits = Math.min(BURST, gained);
      this.#refilledAt = now;
    } else if (this.#credits === BURST) this.#refilledAt = this.#now();
    this.#credits -= 1;
    return true;
  }

  #push(bytes: Uint8Array): void {
    const length = this.#pendingLength + bytes.length;
    if (length > this.#pending.length) {
      const larger = new Uint8Array(
        Math.max(1024, length, Math.min(this.#pending.length * 2, BATCH_BYTES * 2)),
      );
      larger.set(this.#pending.subarray(0, this.#pendingLength));
      this.#pending = larger;
    }
    this.#pending.set(bytes, this.#pendingLength);
    this.#pendingLength = length;
  }

  #keep(bytes: Uint8Array): void {
    if (this.#head.length < EXCERPT_BYTES) {
      const head = new Uint8Array(Math.min(EXCERPT_BYTES, this.#head.length + bytes.length));
      head.set(this.#head);
      head.set(bytes.subarray(0, head.length - this.#head.length), this.#head.length);
      this.#head = head;
    }
    // Only the last of it can still be there in the end.
    const from = Math.max(0, bytes.length - EXCERPT_BYTES);
    for (let index = from; index < bytes.length; index += 1) {
      this.#tail[(this.#bytes + index) % EXCERPT_BYTES] = bytes[index] ?? 0;
    }
  }
}
