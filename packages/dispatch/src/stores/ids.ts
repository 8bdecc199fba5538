/**
 * UUIDs of version 7 (RFC 9562) from an injected clock and random source: ordered by time of making, so that new rows
 * go to the end of their index, and strictly increasing within one generator even when the clock stands still or jumps back.
 */
import type { Clock, Random } from '@millrace/runner';

const HEX = Array.from({ length: 0x10000 }, (_, value) => value.toString(16).padStart(4, '0'));

/** A function that makes one id per call, hyphenated lower case. */
export function uuidV7(clock: Clock, random: Random): () => string {
  let lastMs = 0;
  let counter = 0;
  let prefix = '';
  const tail = (): string => {
    const [a, b] = [Math.floor(random() * 2 ** 30), Math.floor(random() * 2 ** 32)];
    return `-${HEX[0x8000 + (a >>> 16)]}-${HEX[a & 0xffff]}${HEX[b >>> 16]}${HEX[b & 0xffff]}`;
  };
  return () => {
    const now = clock.now();
    if (now > lastMs) {
      lastMs = now;
      // Half of the counter's 12 bits stay free, so that a burst within one millisecond finds room.
      counter = Math.floor(random() * 0x800);
    } else if (counter < 0xfff) {
      counter += 1;
      return `${prefix}${HEX[0x7000 + counter]}${tail()}`;
    } else {
      // The counter is used up: borrow from the future, as the RFC allows.
      lastMs += 1;
      counter = 0;
    }
    const high = Math.floor(lastMs / 0x10000);
    prefix = `${HEX[Math.floor(high / 0x10000)]}${HEX[high % 0x10000]}-${HEX[lastMs % 0x10000]}-`;
    return `${prefix}${HEX[0x7000 + counter]}${tail()}`;
  };
}
