/**
 * WASI preview 1 as a compute sees it: input on fd 0, output on fd 1, diagnostics on fd 2, and nothing else of the world.
 * No files, no environment, no sockets, one argument (`compute`), a clock and a random stream that are the same each time.
 * `node:wasi` is not used: it documents itself as no sandbox, and crashes under repeated use.
 *
 * One object serves one worker, one call at a time. Rules for every function: pointers are unsigned and checked, a bad
 * one is EFAULT and never a trap or an exception of ours; once the guest has ended, calling anything ends it again.
 */
import { getRandomValues } from 'node:crypto';
import type { GuestCall } from '../pool/guest-engine.ts';
import { SeededBytes } from './random.ts';

const SUCCESS = 0;
const EBADF = 8;
const EFAULT = 21;
const EINVAL = 28;
const ENOSYS = 52;
const ENOTDIR = 54;
const ENOTSOCK = 57;
const ENOTSUP = 58;
const ESPIPE = 70;

const RIGHT_FD_READ = 1n << 1n;
const RIGHT_FD_WRITE = 1n << 6n;
const RIGHT_FILESTAT_GET = 1n << 21n;
const RIGHT_POLL = 1n << 27n;

const ARGUMENT = new TextEncoder().encode('compute\0');
/** What the frozen monotonic clock counts for each time it is read. */
const TICK_NS = 1_000n;
const SUBSCRIPTION_BYTES = 48;
const EVENT_BYTES = 32;
const FIRST_OUTPUT_BYTES = 4_096;

/** Thrown to get out of the guest. One object: making an Error costs more than many a guest runs. */
const HALT = new Error('the guest has ended');

/** How a guest ended before its last instruction. */
export type Halt =
  | { readonly kind: 'exit'; readonly code: number }
  | { readonly kind: 'output-limit'; readonly bytes: number };

const NOTHING = new Uint8Array(0);

export class Wasi {
  /** The functions by name, for the import object. */
  readonly functions: Readonly<Record<string, (...args: never[]) => number | void>>;
  #call: GuestCall | null = null;
  #halt: Halt | null = null;
  #memory: WebAssembly.Memory | null = null;
  #buffer: ArrayBuffer | null = null;
  #bytes: Uint8Array = NOTHING;
  #view: DataView = new DataView(new ArrayBuffer(0));
  #open = [true, true, true];
  #inputAt = 0;
  #output: Uint8Array<ArrayBuffer> = new Uint8Array(FIRST_OUTPUT_BYTES);
  #outputLength = 0;
  #elapsed = 0n;
  readonly #random = new SeededBytes();

  constructor() {
    this.functions = this.#functions();
  }

  /** Forgets everything of the call before. */
  begin(call: GuestCall): void {
    this.#call = call;
    this.#halt = null;
    this.attach(null);
    this.#open = [true, true, true];
    this.#inputAt = 0;
    this.#outputLength = 0;
    this.#elapsed = 0n;
    this.#random.reset(call.limits.seed);
  }

  /** The guest's memory, as soon as there is one. */
  attach(memory: WebAssembly.Memory | null): void {
    this.#memory = memory;
    this.#buffer = null;
    this.#refresh();
  }

  get halt(): Halt | null {
    return this.#halt;
  }

  get outputBytes(): number {
    return this.#outputLength;
  }

  get memoryBytes(): number {
    return this.#memory?.buffer.byteLength ?? 0;
  }

  /** What was written to fd 1, in memory of its own. */
  takeOutput(): Uint8Array<ArrayBuffer> {
    return this.#output.slice(0, this.#outputLength);
  }

  /** Lets go of what the guest can no longer use. */
  end(): void {
    this.attach(null);
    this.#call = null;
    if (this.#output.length > 16 * FIRST_OUTPUT_BYTES) this.#output = new Uint8Array(FIRST_OUTPUT_BYTES);
  }

  /** The memory as it is now: growing it makes another buffer. */
  #refresh(): void {
    const buffer = this.#memory?.buffer ?? null;
    if (buffer === this.#buffer && buffer !== null) return;
    this.#buffer = buffer;
    this.#bytes = buffer === null ? NOTHING : new Uint8Array(buffer);
    this.#view = new DataView(this.#bytes.buffer, 0, this.#bytes.length);
  }

  #in(pointer: number, length: number): boolean {
    return pointer + length <= this.#bytes.length;
  }

  get #running(): GuestCall {
    if (this.#call === null) throw HALT;
    return this.#call;
  }

  #functions(): Record<string, (...args: never[]) => number | void> {
    /** What every function does first. */
    const guard = <Args extends unknown[]>(body: (...args: Args) => number) => {
      return (...args: Args): number => {
        if (this.#halt !== null) throw HALT;
        this.#refresh();
        return body(...args);
      };
    };
    /** Functions on a descriptor that stdio cannot answer with anything but `errno`. */
    const onStdio = (errno: number) => guard((fd: number) => (this.#isOpen(fd) ? errno : EBADF));
    const noDirectory = onStdio(ENOTDIR);
    // The descriptor of these stands second.
    const noDirectorySecond = guard((_: number, __: number, fd: number) =>
      this.#isOpen(fd) ? ENOTDIR : EBADF,
    );
    const noSocket = onStdio(ENOTSOCK);
    return {
      args_get: guard((argv: number, buffer: number) => this.#argsGet(argv >>> 0, buffer >>> 0)),
      args_sizes_get: guard((argc: number, size: number) => this.#pair(argc, 1, size, ARGUMENT.length)),
      environ_get: guard(() => SUCCESS),
      environ_sizes_get: guard((count: number, size: number) => this.#pair(count, 0, size, 0)),
      clock_res_get: guard((id: number, to: number) => this.#clockResolution(id, to >>> 0)),
      clock_time_get: guard((id: number, _precision: bigint, to: number) => this.#clockTime(id, to >>> 0)),
      fd_advise: onStdio(ESPIPE),
      fd_allocate: onStdio(ENOTSUP),
      fd_close: guard((fd: number) => this.#close(fd)),
      fd_datasync: onStdio(SUCCESS),
      fd_fdstat_get: guard((fd: number, to: number) => this.#fdstat(fd, to >>> 0)),
      fd_fdstat_set_flags: onStdio(SUCCESS),
      fd_fdstat_set_rights: onStdio(ENOTSUP),
      fd_filestat_get: guard((fd: number, to: number) => this.#filestat(fd, to >>> 0)),
      fd_filestat_set_size: onStdio(ENOTSUP),
      fd_filestat_set_times: onStdio(ENOTSUP),
      fd_pread: onStdio(ESPIPE),
      fd_prestat_get: guard(() => EBADF),
      fd_prestat_dir_name: guard(() => EBADF),
      fd_pwrite: onStdio(ESPIPE),
      fd_read: guard((fd: number, iovs: number, count: number, to: number) =>
        this.#read(fd, iovs >>> 0, count >>> 0, to >>> 0),
      ),
      fd_readdir: noDirectory,
      fd_renumber: guard((from: number, to: number) =>
        this.#isOpen(from) && this.#isOpen(to) ? ENOTSUP : EBADF,
      ),
      fd_seek: onStdio(ESPIPE),
      fd_sync: onStdio(SUCCESS),
      fd_tell: onStdio(ESPIPE),
      fd_write: guard((fd: number, iovs: number, count: number, to: number) =>
        this.#write(fd, iovs >>> 0, count >>> 0, to >>> 0),
      ),
      path_create_directory: noDirectory,
      path_filestat_get: noDirectory,
      path_filestat_set_times: noDirectory,
      path_link: noDirectory,
      path_open: noDirectory,
      path_readlink: noDirectory,
      path_remove_directory: noDirectory,
      path_rename: noDirectory,
      path_symlink: noDirectorySecond,
      path_unlink_file: noDirectory,
      poll_oneoff: guard((subscriptions: number, events: number, count: number, to: number) =>
        this.#poll(subscriptions >>> 0, events >>> 0, count >>> 0, to >>> 0),
      ),
      proc_exit: guard((code: number) => {
        this.#halt = { kind: 'exit', code: code >>> 0 };
        throw HALT;
      }),
      proc_raise: guard(() => ENOSYS),
      random_get: guard((to: number, length: number) => this.#randomGet(to >>> 0, length >>> 0)),
      sched_yield: guard(() => SUCCESS),
      sock_accept: noSocket,
      sock_recv: noSocket,
      sock_send: noSocket,
      sock_shutdown: noSocket,
    };
  }

  #isOpen(fd: number): boolean {
    return this.#open[fd >>> 0] === true;
  }

  #close(fd: number): number {
    if (!this.#isOpen(fd)) return EBADF;
    this.#open[fd >>> 0] = false;
    return SUCCESS;
  }

  #pair(first: number, firstValue: number, second: number, secondValue: number): number {
    if (!this.#in(first >>> 0, 4) || !this.#in(second >>> 0, 4)) return EFAULT;
    this.#view.setUint32(first >>> 0, firstValue, true);
    this.#view.setUint32(second >>> 0, secondValue, true);
    return SUCCESS;
  }

  #argsGet(argv: number, buffer: number): number {
    if (!this.#in(argv, 4) || !this.#in(buffer, ARGUMENT.length)) return EFAULT;
    this.#view.setUint32(argv, buffer, true);
    this.#bytes.set(ARGUMENT, buffer);
    return SUCCESS;
  }

  #clockResolution(id: number, to: number): number {
    if (id !== 0 && id !== 1) return EINVAL;
    if (!this.#in(to, 8)) return EFAULT;
    this.#view.setBigUint64(to, 1n, true);
    return SUCCESS;
  }

  #clockTime(id: number, to: number): number {
    if (id !== 0 && id !== 1) return EINVAL;
    if (!this.#in(to, 8)) return EFAULT;
    this.#view.setBigUint64(to, id === 0 ? this.#realtime() : this.#monotonic(), true);
    return SUCCESS;
  }

  #realtime(): bigint {
    const { limits } = this.#running;
    return limits.clock === 'host' ? BigInt(Date.now()) * 1_000_000n : limits.now;
  }

  #monotonic(): bigint {
    if (this.#running.limits.clock === 'host') return process.hrtime.bigint();
    this.#elapsed += TICK_NS;
    return this.#elapsed;
  }

  /** Neither a terminal nor a file: C libraries then buffer what they write. */
  #fdstat(fd: number, to: number): number {
    if (!this.#isOpen(fd)) return EBADF;
    if (!this.#in(to, 24)) return EFAULT;
    this.#bytes.fill(0, to, to + 24);
    const rights = (fd === 0 ? RIGHT_FD_READ : RIGHT_FD_WRITE) | RIGHT_FILESTAT_GET | RIGHT_POLL;
    this.#view.setBigUint64(to + 8, rights, true);
    return SUCCESS;
  }

  #filestat(fd: number, to: number): number {
    if (!this.#isOpen(fd)) return EBADF;
    if (!this.#in(to, 64)) return EFAULT;
    this.#bytes.fill(0, to, to + 64);
    // One link; type unknown, size and times 0.
    this.#view.setBigUint64(to + 24, 1n, true);
    return SUCCESS;
  }

  /** Whether all buffers of a vector are in the memory. */
  #vectorFits(iovs: number, count: number): boolean {
    if (!this.#in(iovs, count * 8)) return false;
    for (let index = 0; index < count; index += 1) {
      const at = iovs + index * 8;
      if (!this.#in(this.#view.getUint32(at, true), this.#view.getUint32(at + 4, true))) return false;
    }
    return true;
  }

  #read(fd: number, iovs: number, count: number, to: number): number {
    if (fd !== 0 || !this.#isOpen(fd)) return EBADF;
    if (!this.#in(to, 4) || !this.#vectorFits(iovs, count)) return EFAULT;
    const { input } = this.#running;
    let total = 0;
    for (let index = 0; index < count && this.#inputAt < input.length; index += 1) {
      const at = iovs + index * 8;
      const pointer = this.#view.getUint32(at, true);
      const length = this.#view.getUint32(at + 4, true);
      // What was read may have overwritten the vector itself.
      if (!this.#in(pointer, length)) return EFAULT;
      const piece = input.subarray(this.#inputAt, this.#inputAt + length);
      this.#bytes.set(piece, pointer);
      this.#inputAt += piece.length;
      total += piece.length;
    }
    this.#view.setUint32(to, total, true);
    return SUCCESS;
  }

  #write(fd: number, iovs: number, count: number, to: number): number {
    if ((fd !== 1 && fd !== 2) || !this.#isOpen(fd)) return EBADF;
    if (!this.#in(to, 4) || !this.#vectorFits(iovs, count)) return EFAULT;
    const call = this.#running;
    let total = 0;
    for (let index = 0; index < count; index += 1) {
      const at = iovs + index * 8;
      const pointer = this.#view.getUint32(at, true);
      const length = this.#view.getUint32(at + 4, true);
      if (length === 0) continue;
      const piece = this.#bytes.subarray(pointer, pointer + length);
      if (fd === 1) this.#append(piece, call.limits.maxOutputBytes);
      else call.log(piece);
      total += length;
    }
    call.note(this.#bytes.length, this.#outputLength);
    // Vectors may name the same bytes again and again; the count wraps as it would anywhere.
    this.#view.setUint32(to, total >>> 0, true);
    return SUCCESS;
  }

  #append(piece: Uint8Array, maxBytes: number): void {
    const length = this.#outputLength + piece.length;
    if (length > maxBytes) {
      this.#halt = { kind: 'output-limit', bytes: length };
      throw HALT;
    }
    if (length > this.#output.length) {
      const larger = new Uint8Array(
        Math.min(Math.max(length, this.#output.length * 2), Math.max(maxBytes, length)),
      );
      larger.set(this.#output.subarray(0, this.#outputLength));
      this.#output = larger;
    }
    this.#output.set(piece, this.#outputLength);
    this.#outputLength = length;
  }

  #randomGet(to: number, length: number): number {
    if (!this.#in(to, length)) return EFAULT;
    const target = this.#bytes.subarray(to, to + length);
    if (this.#running.limits.random === 'seeded') {
      this.#random.next(target);
      return SUCCESS;
    }
    // The most that may be asked for at once.
    const MOST = 65_536;
    for (let at = 0; at < length; at += MOST) getRandomValues(target.subarray(at, at + MOST));
    return SUCCESS;
  }

  /**
   * Nobody sleeps here. Descriptors are ready at once; without any, the earliest clocks have rung, and the frozen
   * monotonic clock has moved on by what they would have taken.
   */
  #poll(subscriptions: number, events: number, count: number, to: number): number {
    if (count === 0) return EINVAL;
    if (!this.#in(subscriptions, count * SUBSCRIPTION_BYTES)) return EFAULT;
    if (!this.#in(events, count * EVENT_BYTES) || !this.#in(to, 4)) return EFAULT;
    const view = this.#view;
    let earliest: bigint | null = null;
    let descriptors = false;
    for (let index = 0; index < count; index += 1) {
      const at = subscriptions + index * SUBSCRIPTION_BYTES;
      if (view.getUint8(at + 8) !== 0) descriptors = true;
      else {
        const left = this.#timeLeft(at);
        if (left !== null && (earliest === null || left < earliest)) earliest = left;
      }
    }
    // Copied, since the events may be written over the subscriptions.
    const asked = this.#bytes.slice(subscriptions, subscriptions + count * SUBSCRIPTION_BYTES);
    const from = new DataView(asked.buffer);
    const fired: number[] = [];
    for (let index = 0; index < count; index += 1) {
      const at = subscriptions + index * SUBSCRIPTION_BYTES;
      const isClock = view.getUint8(at + 8) === 0;
      const left = isClock ? this.#timeLeft(at) : null;
      const due = isClock ? left === null || left <= (descriptors ? 0n : (earliest ?? 0n)) : true;
      if (due) fired.push(index);
    }
    for (const [slot, index] of fired.entries()) {
      const at = index * SUBSCRIPTION_BYTES;
      const event = events + slot * EVENT_BYTES;
      const tag = from.getUint8(at + 8);
      view.setBigUint64(event, from.getBigUint64(at, true), true);
      view.setBigUint64(event + 8, 0n, true);
      view.setBigUint64(event + 16, 0n, true);
      view.setBigUint64(event + 24, 0n, true);
      view.setUint8(event + 10, tag);
      view.setUint16(event + 8, this.#pollError(tag, from.getUint32(at + 16, true)), true);
      if (tag === 1) view.setBigUint64(event + 16, BigInt(this.#running.input.length - this.#inputAt), true);
    }
    if (!descriptors && earliest !== null && earliest > 0n && this.#running.limits.clock === 'frozen') {
      this.#elapsed = BigInt.asUintN(64, this.#elapsed + earliest);
    }
    view.setUint32(to, fired.length, true);
    return SUCCESS;
  }

  #pollError(tag: number, id: number): number {
    if (tag === 0) return id === 0 || id === 1 ? SUCCESS : EINVAL;
    if (tag > 2) return EINVAL;
    const right = tag === 1 ? id === 0 : id === 1 || id === 2;
    return right && this.#isOpen(id) ? SUCCESS : EBADF;
  }

  /** Nanoseconds until the clock subscription at `at` would ring; `null` for a clock there is not. */
  #timeLeft(at: number): bigint | null {
    const id = this.#view.getUint32(at + 16, true);
    if (id !== 0 && id !== 1) return null;
    const timeout = this.#view.getBigUint64(at + 24, true);
    const absolute = (this.#view.getUint16(at + 40, true) & 1) !== 0;
    if (!absolute) return timeout;
    const frozen = this.#running.limits.clock === 'frozen';
    const now = id === 0 ? this.#realtime() : frozen ? this.#elapsed : process.hrtime.bigint();
    return timeout > now ? timeout - now : 0n;
  }
}
