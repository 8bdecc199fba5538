/**
 * splitmix64, one step per byte, its low 8 bits: the random stream of the reference. Two 32-bit halves instead of a bigint:
 * a guest may ask for its whole memory full.
 */
export class SeededBytes {
  #high = 0;
  #low = 0;

  reset(seed: bigint): void {
    this.#high = Number((seed >> 32n) & 0xffffffffn) >>> 0;
    this.#low = Number(seed & 0xffffffffn) >>> 0;
  }

  /** Fills `target` with what comes next. */
  next(target: Uint8Array): void {
    for (let index = 0; index < target.length; index += 1) target[index] = this.#byte();
  }

  #byte(): number {
    // state += 0x9e3779b97f4a7c15
    const low = this.#low + 0x7f4a7c15;
    this.#high = (this.#high + 0x9e3779b9 + (low > 0xffffffff ? 1 : 0)) >>> 0;
    this.#low = low >>> 0;
    // z = (z ^ z >>> 30) * 0xbf58476d1ce4e5b9
    let high = (this.#high ^ (this.#high >>> 30)) >>> 0;
    let z = (this.#low ^ ((this.#low >>> 30) | (this.#high << 2))) >>> 0;
    let product = highHalf(z, 0x1ce4e5b9) + Math.imul(high, 0x1ce4e5b9) + Math.imul(z, 0xbf58476d);
    z = Math.imul(z, 0x1ce4e5b9) >>> 0;
    high = product >>> 0;
    // z = (z ^ z >>> 27) * 0x94d049bb133111eb
    z = (z ^ ((z >>> 27) | (high << 5))) >>> 0;
    high = (high ^ (high >>> 27)) >>> 0;
    product = highHalf(z, 0x133111eb) + Math.imul(high, 0x133111eb) + Math.imul(z, 0x94d049bb);
    z = Math.imul(z, 0x133111eb) >>> 0;
    high = product >>> 0;
    // z ^ z >>> 31, of which the low 8 bits
    return (z ^ ((z >>> 31) | (high << 1))) & 0xff;
  }
}

/** The upper 32 bits of the product of two unsigned 32-bit numbers. */
function highHalf(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const other = aLow * bHigh + (middle & 0xffff);
  return (aHigh * bHigh + Math.floor(middle / 65_536) + Math.floor(other / 65_536)) >>> 0;
}
