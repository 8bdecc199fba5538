/**
 * The frames of events, which are nearly all a runtime writes, put together in one buffer with one copy of the output.
 * Measured against the general encoder: 0.6 µs instead of 4 for a counter, 20 µs instead of 94 for 64 KiB of output. The tests
 * hold them to its bytes.
 */

export interface StatusFields {
  readonly pid: bigint;
  readonly running?: boolean;
  readonly returnCode?: number;
  readonly stdout?: Uint8Array;
  readonly stderr?: Uint8Array;
}

const TAG_EVENT = 0x08;
const TAG_STATUS = [0xa2, 0x01] as const;
const TAG_RT_STATUS = [0xaa, 0x01] as const;
const TAG_COUNTER = 0x12;
const TAG_FIELD_1_VARINT = 0x08;
const TAG_FIELD_1_BYTES = 0x0a;
const TAG_FIELD_2_VARINT = 0x10;
const TAG_FIELD_2_DOUBLE = 0x11;
const TAG_FIELD_3_VARINT = 0x18;
const TAG_STDOUT = 0x22;
const TAG_STDERR = 0x2a;
const NOTHING = new Uint8Array();

/** An event about a process. Defaults are left out, as everywhere on the wire. */
export function statusFrame(status: StatusFields): Uint8Array {
  const { pid, running = false, returnCode = 0, stdout = NOTHING, stderr = NOTHING } = status;
  const size =
    (pid === 0n ? 0 : 1 + bigVarintSize(pid)) +
    (running ? 2 : 0) +
    (returnCode === 0 ? 0 : 1 + (returnCode < 0 ? 10 : varintSize(returnCode))) +
    bytesSize(stdout) +
    bytesSize(stderr);
  const writer = eventWriter(TAG_STATUS, size);
  if (pid !== 0n) {
    writer.byte(TAG_FIELD_1_VARINT);
    writer.bigVarint(pid);
  }
  if (running) {
    writer.byte(TAG_FIELD_2_VARINT);
    writer.byte(1);
  }
  if (returnCode !== 0) {
    writer.byte(TAG_FIELD_3_VARINT);
    // Negative numbers are written as their 64-bit two's complement.
    if (returnCode < 0) writer.bigVarint(BigInt.asUintN(64, BigInt(returnCode)));
    else writer.varint(returnCode);
  }
  writer.bytes(TAG_STDOUT, stdout);
  writer.bytes(TAG_STDERR, stderr);
  return writer.buffer;
}

/** An event that sets a usage counter. */
export function counterFrame(name: string, value: number): Uint8Array {
  const text = Buffer.from(name);
  // Minus zero is no default: its bits are not zero.
  const hasValue = !Object.is(value, 0);
  const counterSize = bytesSize(text) + (hasValue ? 9 : 0);
  const writer = eventWriter(TAG_RT_STATUS, 1 + varintSize(counterSize) + counterSize);
  writer.byte(TAG_COUNTER);
  writer.varint(counterSize);
  writer.bytes(TAG_FIELD_1_BYTES, text);
  if (hasValue) {
    writer.byte(TAG_FIELD_2_DOUBLE);
    writer.double(value);
  }
  return writer.buffer;
}

/** A frame up to the body of its message, which has `size` bytes. */
function eventWriter(tag: readonly [number, number], size: number): FrameWriter {
  const payload = 2 + 2 + varintSize(size) + size;
  const writer = new FrameWriter(varintSize(payload) + payload);
  writer.varint(payload);
  writer.byte(TAG_EVENT);
  writer.byte(1);
  writer.byte(tag[0]);
  writer.byte(tag[1]);
  writer.varint(size);
  return writer;
}

class FrameWriter {
  readonly buffer: Buffer;
  #at = 0;

  constructor(size: number) {
    this.buffer = Buffer.allocUnsafe(size);
  }

  byte(value: number): void {
    this.buffer[this.#at] = value;
    this.#at += 1;
  }

  varint(value: number): void {
    let rest = value;
    while (rest > 0x7f) {
      this.byte((rest & 0x7f) | 0x80);
      rest = Math.floor(rest / 0x80);
    }
    this.byte(rest);
  }

  bigVarint(value: bigint): void {
    if (value <= BigInt(Number.MAX_SAFE_INTEGER)) {
      this.varint(Number(value));
      return;
    }
    let rest = value;
    while (rest > 0x7fn) {
      this.byte(Number(rest & 0x7fn) | 0x80);
      rest >>= 7n;
    }
    this.byte(Number(rest));
  }

  /** A field; left out when empty. */
  bytes(tag: number, value: Uint8Array): void {
    if (value.length === 0) return;
    this.byte(tag);
    this.varint(value.length);
    this.buffer.set(value, this.#at);
    this.#at += value.length;
  }

  double(value: number): void {
    this.#at = this.buffer.writeDoubleLE(value, this.#at);
  }
}

function bytesSize(value: Uint8Array): number {
  return value.length === 0 ? 0 : 1 + varintSize(value.length) + value.length;
}

function varintSize(value: number): number {
  let size = 1;
  for (let rest = value; rest > 0x7f; rest = Math.floor(rest / 0x80)) size += 1;
  return size;
}

function bigVarintSize(value: bigint): number {
  let size = 1;
  for (let rest = value; rest > 0x7fn; rest >>= 7n) size += 1;
  return size;
}
