/**
 * WASI preview 1 as a granted command sees it: what `Wasi` gives every compute, and beside it arguments, variables, folders,
 * both output streams as they are written, and clocks one can sleep by. The rules are those of `Wasi`: pointers are checked,
 * a bad one is EFAULT and never a trap; once the guest has ended, calling anything ends it again.
 */
import type { BigIntStats } from 'node:fs';
import type { GuestCall } from '../pool/guest-engine.ts';
import { Wasi } from '../wasm/wasi.ts';
import { ERRNO, Refusal, errnoOf } from './errno.ts';
import { FD_FLAGS, GuestFiles, type FolderEntry, type OpenFile, type TimesRequest } from './files.ts';
import { frame, type CommandRequest } from './messages.ts';

const RIGHT = { read: 1n << 1n, seek: 1n << 2n, write: 1n << 6n } as const;
/** All that preview 1 knows. */
const ALL_RIGHTS = (1n << 30n) - 1n;
const FILE_TYPE = { unknown: 0, folder: 3, file: 4, link: 7 } as const;
const WHENCE = { set: 0, cur: 1, end: 2 } as const;
const PRESTAT_BYTES = 8;
const FDSTAT_BYTES = 24;
const FILESTAT_BYTES = 64;
const DIRENT_BYTES = 24;
const SUBSCRIPTION_BYTES = 48;
const NOTHING = new Uint8Array(0);

/** What the guest was ended for, if not by itself. */
export interface OutputBreach {
  readonly bytes: number;
}

type HostFunction = (...args: never[]) => number | void;

export class CommandHost implements Disposable {
  /** The functions by name, for the import object. */
  readonly functions: Readonly<Record<string, HostFunction>>;
  readonly #wasi: Wasi;
  readonly #call: GuestCall;
  readonly #files: GuestFiles;
  readonly #args: readonly Uint8Array[];
  readonly #env: readonly Uint8Array[];
  readonly #maxOutputBytes: number;
  readonly #sleeper = new Int32Array(new SharedArrayBuffer(4));
  #memory: WebAssembly.Memory | null = null;
  #bytes: Uint8Array = NOTHING;
  #view: DataView = new DataView(new ArrayBuffer(0));
  #outputBytes = 0;
  #breach: OutputBreach | null = null;

  constructor(wasi: Wasi, call: GuestCall, request: CommandRequest) {
    this.#wasi = wasi;
    this.#call = call;
    this.#files = new GuestFiles(request.mounts, request);
    this.#args = request.args.map(cString);
    this.#env = Object.entries(request.env).map(([name, value]) => cString(`${name}=${value}`));
    this.#maxOutputBytes = request.maxOutputBytes;
    this.functions = { ...wasi.functions, ...this.#granted() };
  }

  /** The guest's memory, as soon as there is one. */
  attach(memory: WebAssembly.Memory): void {
    this.#memory = memory;
    this.#wasi.attach(memory);
  }

  get breach(): OutputBreach | null {
    return this.#breach;
  }

  /** Closes what the guest left open. */
  [Symbol.dispose](): void {
    this.#files[Symbol.dispose]();
  }

  #refresh(): void {
    const buffer = this.#memory?.buffer;
    if (buffer === undefined || buffer === this.#bytes.buffer) return;
    this.#bytes = new Uint8Array(buffer);
    this.#view = new DataView(buffer);
  }

  #granted(): Record<string, HostFunction> {
    const base = this.#wasi.functions as Readonly<Record<string, (...args: unknown[]) => number>>;
    /** For functions of descriptors: those below 3 are the streams, which the base knows. */
    const onFile = <Args extends unknown[]>(
      name: string,
      body: (fd: number, ...args: Args) => number | void,
    ) => {
      const standard = base[name]!;
      return (fd: number, ...args: Args): number => {
        if (fd >>> 0 < 3) return standard(fd, ...args);
        return this.#guard(() => body(fd >>> 0, ...args));
      };
    };
    const guard =
      <Args extends unknown[]>(body: (...args: Args) => number | void) =>
      (...args: Args): number =>
        this.#guard(() => body(...args));
    const files = this.#files;
    return {
      args_get: guard((list: number, buffer: number) => this.#strings(this.#args, list, buffer)),
      args_sizes_get: guard((count: number, size: number) => this.#sizes(this.#args, count, size)),
      environ_get: guard((list: number, buffer: number) => this.#strings(this.#env, list, buffer)),
      environ_sizes_get: guard((count: number, size: number) => this.#sizes(this.#env, count, size)),
      fd_advise: onFile('fd_advise', (fd: number) => void files.file(fd)),
      fd_allocate: onFile('fd_allocate', (fd: number, offset: bigint, length: bigint) => {
        const file = files.file(fd);
        const end = position(offset) + position(length);
        if (end > files.size(file)) files.setSize(file, end);
      }),
      fd_close: onFile('fd_close', (fd: number) => files.close(fd)),
      fd_datasync: onFile('fd_datasync', (fd: number) => this.#sync(fd)),
      fd_fdstat_get: onFile('fd_fdstat_get', (fd: number, to: number) => this.#fdstat(fd, to >>> 0)),
      fd_fdstat_set_flags: onFile('fd_fdstat_set_flags', (fd: number, flags: number) => {
        files.file(fd).append = (flags & FD_FLAGS.append) !== 0;
      }),
      fd_fdstat_set_rights: onFile('fd_fdstat_set_rights', (fd: number) => {
        files.get(fd);
        return ERRNO.notsup;
      }),
      fd_filestat_get: onFile('fd_filestat_get', (fd: number, to: number) =>
        this.#filestat(files.stat(files.get(fd)), to >>> 0),
      ),
      fd_filestat_set_size: onFile('fd_filestat_set_size', (fd: number, size: bigint) =>
        files.setSize(files.file(fd), position(size)),
      ),
      fd_filestat_set_times: onFile(
        'fd_filestat_set_times',
        (fd: number, atim: bigint, mtim: bigint, flags: number) =>
          files.setTimes(files.file(fd), times(atim, mtim, flags)),
      ),
      fd_pread: onFile('fd_pread', (fd: number, iovs: number, count: number, offset: bigint, to: number) =>
        this.#read(files.file(fd), position(offset), iovs >>> 0, count >>> 0, to >>> 0),
      ),
      fd_prestat_get: guard((fd: number, to: number) => this.#prestat(fd >>> 0, to >>> 0)),
      fd_prestat_dir_name: guard((fd: number, to: number, length: number) =>
        this.#prestatName(fd >>> 0, to >>> 0, length >>> 0),
      ),
      fd_pwrite: onFile('fd_pwrite', (fd: number, iovs: number, count: number, offset: bigint, to: number) =>
        this.#write(files.file(fd), position(offset), iovs >>> 0, count >>> 0, to >>> 0),
      ),
      fd_read: onFile('fd_read', (fd: number, iovs: number, count: number, to: number) => {
        const file = files.file(fd);
        const read = this.#read(file, file.position, iovs >>> 0, count >>> 0, to >>> 0);
        file.position += read;
        return ERRNO.success;
      }),
      fd_readdir: onFile(
        'fd_readdir',
        (fd: number, to: number, length: number, cookie: bigint, used: number) =>
          this.#readdir(fd, to >>> 0, length >>> 0, BigInt.asUintN(64, cookie), used >>> 0),
      ),
      fd_renumber: onFile('fd_renumber', (from: number, to: number) => {
        if (to >>> 0 < 3) throw new Refusal(ERRNO.notsup);
        files.renumber(from, to >>> 0);
      }),
      fd_seek: onFile('fd_seek', (fd: number, offset: bigint, whence: number, to: number) =>
        this.#seek(files.file(fd), offset, whence, to >>> 0),
      ),
      fd_sync: onFile('fd_sync', (fd: number) => this.#sync(fd)),
      fd_tell: onFile('fd_tell', (fd: number, to: number) => {
        const file = files.file(fd);
        this.#checked(to >>> 0, 8);
        this.#view.setBigUint64(to >>> 0, BigInt(file.position), true);
      }),
      fd_write: (fd: number, iovs: number, count: number, to: number): number => {
        const number = fd >>> 0;
        if (number === 0) return base['fd_write']!(fd, iovs, count, to);
        if (number < 3)
          return this.#guard(() => this.#print(number as 1 | 2, iovs >>> 0, count >>> 0, to >>> 0));
        return this.#guard(() => {
          const file = files.file(number);
          const at = file.append ? files.size(file) : file.position;
          file.position = at + this.#write(file, at, iovs >>> 0, count >>> 0, to >>> 0);
          return ERRNO.success;
        });
      },
      path_create_directory: guard((fd: number, path: number, length: number) =>
        files.makeFolder(files.folder(fd >>> 0), this.#path(path, length)),
      ),
      path_filestat_get: guard((fd: number, _flags: number, path: number, length: number, to: number) =>
        this.#filestat(files.statAt(files.folder(fd >>> 0), this.#path(path, length)), to >>> 0),
      ),
      path_filestat_set_times: guard(
        (
          fd: number,
          _flags: number,
          path: number,
          length: number,
          atim: bigint,
          mtim: bigint,
          flags: number,
        ) => files.setTimesAt(files.folder(fd >>> 0), this.#path(path, length), times(atim, mtim, flags)),
      ),
      path_link: guard((fd: number) => {
        files.folder(fd >>> 0);
        return ERRNO.notsup;
      }),
      path_open: guard(
        (
          fd: number,
          _lookup: number,
          path: number,
          length: number,
          flags: number,
          rights: bigint,
          _inheriting: bigint,
          fdflags: number,
          to: number,
        ) => {
          this.#checked(to >>> 0, 4);
          const number = files.openAt(files.folder(fd >>> 0), this.#path(path, length), {
            flags,
            read: (rights & RIGHT.read) !== 0n,
            write: (rights & RIGHT.write) !== 0n,
            append: (fdflags & FD_FLAGS.append) !== 0,
          });
          this.#view.setUint32(to >>> 0, number, true);
        },
      ),
      path_readlink: guard((fd: number, path: number, length: number) => {
        files.statAt(files.folder(fd >>> 0), this.#path(path, length));
        // There is nothing here that the guest may see as a link.
        return ERRNO.inval;
      }),
      path_remove_directory: guard((fd: number, path: number, length: number) =>
        files.removeFolder(files.folder(fd >>> 0), this.#path(path, length)),
      ),
      path_rename: guard(
        (fd: number, path: number, length: number, toFd: number, toPath: number, toLength: number) =>
          files.rename(
            files.folder(fd >>> 0),
            this.#path(path, length),
            files.folder(toFd >>> 0),
            this.#path(toPath, toLength),
          ),
      ),
      path_symlink: guard((_target: number, _length: number, fd: number) => {
        files.folder(fd >>> 0);
        return ERRNO.notsup;
      }),
      path_unlink_file: guard((fd: number, path: number, length: number) =>
        files.unlink(files.folder(fd >>> 0), this.#path(path, length)),
      ),
      poll_oneoff: (subscriptions: number, events: number, count: number, to: number): number => {
        this.#guard(() => this.#sleep(subscriptions >>> 0, count >>> 0));
        return base['poll_oneoff']!(subscriptions, events, count, to);
      },
    };
  }

  /** What every function does first and last. */
  #guard(body: () => number | void): number {
    // Asking the base is what ends a guest that has ended.
    if (this.#wasi.halt !== null || this.#breach !== null) this.#end();
    this.#refresh();
    try {
      return body() ?? ERRNO.success;
    } catch (error) {
      if (this.#breach !== null) throw error;
      return errnoOf(error);
    }
  }

  #end(): never {
    (this.#wasi.functions['proc_exit'] as unknown as (code: number) => never)(1);
    throw new Error('proc_exit came back');
  }

  #checked(pointer: number, length: number): void {
    if (pointer + length > this.#bytes.length) throw new Refusal(ERRNO.fault);
  }

  #path(pointer: number, length: number): Uint8Array {
    this.#checked(pointer >>> 0, length >>> 0);
    return this.#bytes.subarray(pointer >>> 0, (pointer >>> 0) + (length >>> 0));
  }

  #strings(strings: readonly Uint8Array[], list: number, buffer: number): void {
    let at = buffer >>> 0;
    this.#checked(list >>> 0, strings.length * 4);
    this.#checked(at, total(strings));
    for (const [index, text] of strings.entries()) {
      this.#view.setUint32((list >>> 0) + index * 4, at, true);
      this.#bytes.set(text, at);
      at += text.length;
    }
  }

  #sizes(strings: readonly Uint8Array[], count: number, size: number): void {
    this.#checked(count >>> 0, 4);
    this.#checked(size >>> 0, 4);
    this.#view.setUint32(count >>> 0, strings.length, true);
    this.#view.setUint32(size >>> 0, total(strings), true);
  }

  #sync(fd: number): void {
    const one = this.#files.get(fd);
    if (one.kind === 'file') this.#files.sync(one);
  }

  #fdstat(fd: number, to: number): void {
    this.#checked(to, FDSTAT_BYTES);
    const one = this.#files.get(fd);
    const view = this.#view;
    this.#bytes.fill(0, to, to + FDSTAT_BYTES);
    view.setUint8(to, one.kind === 'folder' ? FILE_TYPE.folder : FILE_TYPE.file);
    if (one.kind === 'folder') {
      const rights = one.mount.writable ? ALL_RIGHTS : ALL_RIGHTS & ~RIGHT.write;
      view.setBigUint64(to + 8, rights & ~RIGHT.seek, true);
      view.setBigUint64(to + 16, rights, true);
      return;
    }
    view.setUint16(to + 2, one.append ? FD_FLAGS.append : 0, true);
    const denied = (one.readable ? 0n : RIGHT.read) | (one.writable ? 0n : RIGHT.write);
    view.setBigUint64(to + 8, ALL_RIGHTS & ~denied, true);
  }

  #filestat(stats: BigIntStats, to: number): void {
    this.#checked(to, FILESTAT_BYTES);
    const view = this.#view;
    const kind = stats.isDirectory()
      ? FILE_TYPE.folder
      : stats.isFile()
        ? FILE_TYPE.file
        : stats.isSymbolicLink()
          ? FILE_TYPE.link
          : FILE_TYPE.unknown;
    view.setBigUint64(to, 0n, true);
    view.setBigUint64(to + 8, stats.ino, true);
    view.setBigUint64(to + 16, BigInt(kind), true);
    view.setBigUint64(to + 24, stats.nlink, true);
    view.setBigUint64(to + 32, stats.size, true);
    view.setBigUint64(to + 40, stats.atimeNs, true);
    view.setBigUint64(to + 48, stats.mtimeNs, true);
    view.setBigUint64(to + 56, stats.ctimeNs, true);
  }

  #prestat(fd: number, to: number): void {
    const name = this.#preopenName(fd);
    this.#checked(to, PRESTAT_BYTES);
    this.#view.setUint32(to, 0, true);
    this.#view.setUint32(to + 4, name.length, true);
  }

  #prestatName(fd: number, to: number, length: number): void {
    const name = this.#preopenName(fd);
    if (length < name.length) throw new Refusal(ERRNO.nametoolong);
    this.#checked(to, name.length);
    this.#bytes.set(name, to);
  }

  #preopenName(fd: number): Uint8Array {
    // The streams are no granted folders; asking the table says so.
    const one = this.#files.get(fd);
    if (one.kind !== 'folder' || !one.preopen) throw new Refusal(ERRNO.badf);
    return Buffer.from(one.mount.guestPath);
  }

  /** Bytes read into the buffers of a vector, which is told at `to`. */
  #read(file: OpenFile, from: number, iovs: number, count: number, to: number): number {
    this.#checked(to, 4);
    let read = 0;
    for (const buffer of this.#vector(iovs, count)) {
      const got = this.#files.readAt(file, buffer, from + read);
      read += got;
      if (got < buffer.length) break;
    }
    this.#view.setUint32(to, read, true);
    return read;
  }

  #write(file: OpenFile, at: number, iovs: number, count: number, to: number): number {
    this.#checked(to, 4);
    let written = 0;
    for (const buffer of this.#vector(iovs, count)) {
      const taken = this.#files.writeAt(file, buffer, at + written);
      written += taken;
      if (taken < buffer.length) break;
    }
    this.#view.setUint32(to, written, true);
    return written;
  }

  #print(stream: 1 | 2, iovs: number, count: number, to: number): void {
    this.#checked(to, 4);
    let written = 0;
    for (const buffer of this.#vector(iovs, count)) {
      this.#outputBytes += buffer.length;
      if (this.#outputBytes > this.#maxOutputBytes) {
        this.#breach = { bytes: this.#outputBytes };
        this.#end();
      }
      this.#call.log(frame(stream, buffer));
      written += buffer.length;
    }
    this.#call.note(this.#bytes.length, this.#outputBytes);
    this.#view.setUint32(to, written >>> 0, true);
  }

  /** The buffers that are not empty; all are in the memory before the first comes. Reading may change the vector itself. */
  *#vector(iovs: number, count: number): Generator<Uint8Array> {
    this.#checked(iovs, count * 8);
    for (let index = 0; index < count; index += 1) this.#buffer(iovs, index);
    for (let index = 0; index < count; index += 1) {
      const buffer = this.#buffer(iovs, index);
      if (buffer.length > 0) yield buffer;
    }
  }

  #buffer(iovs: number, index: number): Uint8Array {
    const pointer = this.#view.getUint32(iovs + index * 8, true);
    const length = this.#view.getUint32(iovs + index * 8 + 4, true);
    this.#checked(pointer, length);
    return this.#bytes.subarray(pointer, pointer + length);
  }

  #seek(file: OpenFile, offset: bigint, whence: number, to: number): void {
    this.#checked(to, 8);
    let base: number;
    if (whence === WHENCE.set) base = 0;
    else if (whence === WHENCE.cur) base = file.position;
    else if (whence === WHENCE.end) base = this.#files.size(file);
    else throw new Refusal(ERRNO.inval);
    const target = BigInt(base) + BigInt.asIntN(64, offset);
    if (target < 0n) throw new Refusal(ERRNO.inval);
    file.position = position(target);
    this.#view.setBigUint64(to, target, true);
  }

  #readdir(fd: number, to: number, length: number, cookie: bigint, used: number): void {
    this.#checked(to, length);
    this.#checked(used, 4);
    const entries = this.#files.list(this.#files.folder(fd), cookie === 0n);
    let at = 0;
    for (let index = Number(cookie); index < entries.length && at < length; index += 1) {
      const record = dirent(entries[index]!, BigInt(index + 1));
      // The last one is cut where the buffer ends: that is how the guest learns that there is more.
      const part = record.subarray(0, length - at);
      this.#bytes.set(part, to + at);
      at += part.length;
    }
    this.#view.setUint32(used, at, true);
  }

  /** Until the first of the clocks rings, unless a descriptor is asked about, too. The rest is the base's. */
  #sleep(subscriptions: number, count: number): void {
    this.#checked(subscriptions, count * SUBSCRIPTION_BYTES);
    let earliest: bigint | null = null;
    for (let index = 0; index < count; index += 1) {
      const at = subscriptions + index * SUBSCRIPTION_BYTES;
      if (this.#view.getUint8(at + 8) !== 0) return;
      const left = this.#timeLeft(at);
      if (earliest === null || left < earliest) earliest = left;
    }
    if (earliest === null || earliest <= 0n) return;
    // The end of the thread ends this, too. The longest a timer can be is more than any limit.
    Atomics.wait(this.#sleeper, 0, 0, Math.min(Number(earliest) / 1e6, 2 ** 31 - 1));
  }

  #timeLeft(at: number): bigint {
    const timeout = this.#view.getBigUint64(at + 24, true);
    const absolute = (this.#view.getUint16(at + 40, true) & 1) !== 0;
    if (!absolute) return timeout;
    const realtime = this.#view.getUint32(at + 16, true) === 0;
    return timeout - (realtime ? BigInt(Date.now()) * 1_000_000n : process.hrtime.bigint());
  }
}

function dirent(entry: FolderEntry, next: bigint): Uint8Array {
  const record = Buffer.alloc(DIRENT_BYTES + entry.name.length);
  const kinds = { file: FILE_TYPE.file, folder: FILE_TYPE.folder, other: FILE_TYPE.unknown } as const;
  record.writeBigUInt64LE(next, 0);
  record.writeUInt32LE(entry.name.length, 16);
  record.writeUInt8(kinds[entry.kind], 20);
  record.set(entry.name, DIRENT_BYTES);
  return record;
}

/** A position or size as a number. */
function position(value: bigint): number {
  const unsigned = BigInt.asUintN(64, value);
  if (unsigned > BigInt(Number.MAX_SAFE_INTEGER)) throw new Refusal(ERRNO.fbig);
  return Number(unsigned);
}

function times(atimNs: bigint, mtimNs: bigint, flags: number): TimesRequest {
  return { flags, atimNs: BigInt.asUintN(64, atimNs), mtimNs: BigInt.asUintN(64, mtimNs) };
}

function cString(text: string): Uint8Array {
  return Buffer.from(`${text}\0`);
}

function total(strings: readonly Uint8Array[]): number {
  return strings.reduce((sum, text) => sum + text.length, 0);
}
