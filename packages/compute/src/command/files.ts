/**
 * The folders a guest was granted, and what it has open in them: descriptors from 3 on.
 *
 * The wall: a path is taken apart here, resolved against the folder it is relative to, and never leaves that folder by `..`. Each
 * folder on the way must be one, and a symbolic link is neither followed nor made, wherever it came from. So nothing
 * outside of the granted folders is reached, provided that nobody else puts links into them while the guest runs.
 * Only folders and regular files are opened. Hard links are not made.
 *
 * What a guest may take up is bounded: bytes and files in the writable folders, counted from what is there when it
 * first writes, descriptors, and the length of a path.
 */
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  futimesSync,
  lstatSync,
  lutimesSync,
  mkdirSync,
  openSync,
  readSync,
  readdirSync,
  renameSync,
  rmdirSync,
  unlinkSync,
  writeSync,
  type BigIntStats,
  type Stats,
} from 'node:fs';
import { ERRNO, Refusal } from './errno.ts';

export interface Mount {
  /** Absolute path in the guest. */
  readonly guestPath: string;
  /** Absolute path on the machine; a folder, without links on the way. */
  readonly hostPath: string;
  readonly writable: boolean;
}

export interface FileLimits {
  /** Bytes in all writable folders together; past it, writing gives EDQUOT. */
  readonly maxStorageBytes: number;
  /** Files and folders in them; past it, making one gives EDQUOT. */
  readonly maxFiles: number;
  /** Descriptors at once; past it, opening gives EMFILE. */
  readonly maxOpenFiles: number;
}

export const OPEN = { creat: 1, directory: 2, excl: 4, trunc: 8 } as const;
export const FD_FLAGS = { append: 1 } as const;
export const SET_TIMES = { atim: 1, atimNow: 2, mtim: 4, mtimNow: 8 } as const;

const MAX_PATH_BYTES = 4_096;
const MAX_DEPTH = 128;
/** Node takes numbers of 31 bits for lengths; a shorter read or write than asked for is always allowed. */
const MAX_PIECE = 2 ** 30;

export interface OpenFolder {
  readonly kind: 'folder';
  readonly mount: Mount;
  /** Below the mount. */
  readonly path: readonly string[];
  /** A granted folder itself: what the guest is told it is called. */
  readonly preopen: boolean;
  /** What was listed, for a listing that goes on. */
  entries: readonly FolderEntry[] | null;
}

export interface OpenFile {
  readonly kind: 'file';
  readonly fd: number;
  readonly inode: number;
  readonly mount: Mount;
  readonly readable: boolean;
  readonly writable: boolean;
  append: boolean;
  position: number;
}

export type Descriptor = OpenFolder | OpenFile;

export interface FolderEntry {
  readonly name: Uint8Array;
  readonly kind: 'file' | 'folder' | 'other';
}

export interface OpenRequest {
  /** Of {@link OPEN}. */
  readonly flags: number;
  readonly read: boolean;
  readonly write: boolean;
  readonly append: boolean;
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Every method throws a {@link Refusal}, or an error of the file system. */
export class GuestFiles implements Disposable {
  readonly #limits: FileLimits;
  readonly #mounts: readonly Mount[];
  readonly #open = new Map<number, Descriptor>();
  /** Null until something is written. */
  #taken: { bytes: number; files: number } | null = null;

  constructor(mounts: readonly Mount[], limits: FileLimits) {
    this.#mounts = mounts;
    this.#limits = limits;
    for (const [index, mount] of mounts.entries()) {
      this.#open.set(3 + index, { kind: 'folder', mount, path: [], preopen: true, entries: null });
    }
  }

  [Symbol.dispose](): void {
    for (const one of this.#open.values()) if (one.kind === 'file') closeSync(one.fd);
    this.#open.clear();
  }

  get(number: number): Descriptor {
    const found = this.#open.get(number);
    if (found === undefined) throw new Refusal(ERRNO.badf);
    return found;
  }

  file(number: number): OpenFile {
    const found = this.get(number);
    if (found.kind !== 'file') throw new Refusal(ERRNO.isdir);
    return found;
  }

  folder(number: number): OpenFolder {
    const found = this.get(number);
    if (found.kind !== 'folder') throw new Refusal(ERRNO.notdir);
    return found;
  }

  close(number: number): void {
    const found = this.get(number);
    this.#open.delete(number);
    if (found.kind !== 'file') return;
    // What was unlinked while it was open takes up its bytes until now.
    const { nlink, size } = fstatSync(found.fd);
    if (nlink === 0 && !this.#isOpen(found.inode)) this.#giveBytes(size);
    closeSync(found.fd);
  }

  renumber(from: number, to: number): void {
    const moved = this.get(from);
    // Both must be open, and neither may be one of the standard streams, which are not in the table.
    this.get(to);
    if (from === to) return;
    this.close(to);
    this.#open.delete(from);
    this.#open.set(to, moved);
  }

  /** The number of the new descriptor. */
  openAt(folder: OpenFolder, raw: Uint8Array, request: OpenRequest): number {
    const { path, mustBeFolder } = this.#resolve(folder, raw);
    const { mount } = folder;
    if (this.#open.size >= this.#limits.maxOpenFiles) throw new Refusal(ERRNO.mfile);
    const creates = (request.flags & OPEN.creat) !== 0;
    const truncates = (request.flags & OPEN.trunc) !== 0;
    const wantsFolder = mustBeFolder || (request.flags & OPEN.directory) !== 0;
    const host = this.#host(mount, path);
    const before = lstatSync(host, { throwIfNoEntry: false }) ?? null;
    if (before !== null && creates && (request.flags & OPEN.excl) !== 0) throw new Refusal(ERRNO.exist);
    if (before?.isDirectory()) {
      // A folder is opened for writing by nobody, whatever rights come along: those are for what is in it.
      if (truncates || creates) throw new Refusal(ERRNO.isdir);
      return this.#add({ kind: 'folder', mount, path, preopen: false, entries: null });
    }
    if (before !== null && wantsFolder) throw new Refusal(ERRNO.notdir);
    if (before === null && (!creates || wantsFolder)) throw new Refusal(ERRNO.noent);
    if (before?.isSymbolicLink()) throw new Refusal(ERRNO.loop);
    // A pipe would hold the guest's thread where no limit reaches it.
    if (before !== null && !before.isFile()) throw new Refusal(ERRNO.acces);
    if ((request.write || truncates || before === null) && !mount.writable) throw new Refusal(ERRNO.rofs);
    if (before === null) this.#takeFile();
    const access = request.write || truncates ? constants.O_RDWR : constants.O_RDONLY;
    const made = before === null ? constants.O_CREAT | constants.O_EXCL : 0;
    let fd: number;
    try {
      fd = openSync(host, access | made | constants.O_NOFOLLOW | constants.O_NONBLOCK, 0o644);
    } catch (error) {
      if (before === null) this.#giveFile();
      throw error;
    }
    if (truncates && before !== null) this.#resize(fd, before.size, 0);
    return this.#add({
      kind: 'file',
      fd,
      inode: fstatSync(fd).ino,
      mount,
      readable: request.read,
      writable: request.write,
      append: request.append,
      position: 0,
    });
  }

  /** Bytes read into `target` at `position`; moves nothing. */
  readAt(file: OpenFile, target: Uint8Array, position: number): number {
    if (!file.readable) throw new Refusal(ERRNO.badf);
    return readSync(file.fd, target, 0, Math.min(target.length, MAX_PIECE), position);
  }

  /** Bytes written, all of them or at most 1 GiB; moves nothing. */
  writeAt(file: OpenFile, source: Uint8Array, position: number): number {
    if (!file.writable) throw new Refusal(ERRNO.badf);
    const length = Math.min(source.length, MAX_PIECE);
    const size = this.size(file);
    const grown = Math.max(0, position + length - size);
    this.#takeBytes(grown);
    let written = 0;
    try {
      while (written < length) {
        written += writeSync(file.fd, source, written, length - written, position + written);
      }
    } catch (error) {
      this.#giveBytes(grown - Math.max(0, position + written - size));
      if (written === 0) throw error;
    }
    return written;
  }

  size(file: OpenFile): number {
    return fstatSync(file.fd).size;
  }

  setSize(file: OpenFile, size: number): void {
    if (!file.writable) throw new Refusal(ERRNO.badf);
    this.#resize(file.fd, this.size(file), size);
  }

  sync(file: OpenFile): void {
    fsyncSync(file.fd);
  }

  stat(descriptor: Descriptor): BigIntStats {
    if (descriptor.kind === 'file') return fstatSync(descriptor.fd, { bigint: true });
    return this.#statAt(descriptor.mount, descriptor.path);
  }

  statAt(folder: OpenFolder, raw: Uint8Array): BigIntStats {
    const { path, mustBeFolder } = this.#resolve(folder, raw);
    const found = this.#statAt(folder.mount, path);
    if (mustBeFolder && !found.isDirectory()) throw new Refusal(ERRNO.notdir);
    return found;
  }

  setTimes(file: OpenFile, times: TimesRequest): void {
    if (!file.mount.writable) throw new Refusal(ERRNO.rofs);
    const { atime, mtime } = timesOf(times, fstatSync(file.fd));
    futimesSync(file.fd, atime, mtime);
  }

  setTimesAt(folder: OpenFolder, raw: Uint8Array, times: TimesRequest): void {
    const { path } = this.#resolve(folder, raw);
    if (!folder.mount.writable) throw new Refusal(ERRNO.rofs);
    const host = this.#host(folder.mount, path);
    const { atime, mtime } = timesOf(times, lstatSync(host));
    lutimesSync(host, atime, mtime);
  }

  makeFolder(folder: OpenFolder, raw: Uint8Array): void {
    const host = this.#toChange(folder, raw).host;
    this.#takeFile();
    try {
      mkdirSync(host);
    } catch (error) {
      this.#giveFile();
      throw error;
    }
  }

  removeFolder(folder: OpenFolder, raw: Uint8Array): void {
    const { host, path } = this.#toChange(folder, raw);
    // The granted folder itself belongs to whoever granted it.
    if (path.length === 0) throw new Refusal(ERRNO.busy);
    rmdirSync(host);
    this.#giveFile();
  }

  unlink(folder: OpenFolder, raw: Uint8Array): void {
    const { host, mustBeFolder } = this.#toChange(folder, raw);
    const found = lstatSync(host);
    if (found.isDirectory()) throw new Refusal(ERRNO.isdir);
    if (mustBeFolder) throw new Refusal(ERRNO.notdir);
    unlinkSync(host);
    this.#gone(found);
  }

  rename(from: OpenFolder, rawFrom: Uint8Array, to: OpenFolder, rawTo: Uint8Array): void {
    const source = this.#toChange(from, rawFrom);
    const target = this.#toChange(to, rawTo);
    if (source.path.length === 0 || target.path.length === 0) throw new Refusal(ERRNO.busy);
    const replaced = lstatSync(target.host, { throwIfNoEntry: false });
    const same = replaced?.ino === lstatSync(source.host).ino;
    renameSync(source.host, target.host);
    if (replaced !== undefined && !same) this.#gone(replaced);
  }

  /** With `.` and `..` first; the same listing until it is asked for from the start again. */
  list(folder: OpenFolder, fromStart: boolean): readonly FolderEntry[] {
    if (folder.entries !== null && !fromStart) return folder.entries;
    const host = this.#host(folder.mount, folder.path);
    const entries: FolderEntry[] = [
      { name: Buffer.from('.'), kind: 'folder' },
      { name: Buffer.from('..'), kind: 'folder' },
    ];
    for (const entry of readdirSync(host, { withFileTypes: true, encoding: 'buffer' })) {
      const kind = entry.isFile() ? 'file' : entry.isDirectory() ? 'folder' : 'other';
      entries.push({ name: entry.name, kind });
    }
    folder.entries = entries;
    return entries;
  }

  #add(descriptor: Descriptor): number {
    let number = 3;
    while (this.#open.has(number)) number += 1;
    this.#open.set(number, descriptor);
    return number;
  }

  /** For what makes, renames or removes. */
  #toChange(
    folder: OpenFolder,
    raw: Uint8Array,
  ): { readonly host: string; readonly path: readonly string[]; readonly mustBeFolder: boolean } {
    const { path, mustBeFolder } = this.#resolve(folder, raw);
    if (!folder.mount.writable) throw new Refusal(ERRNO.rofs);
    // As it is before the change.
    this.#measured();
    return { host: this.#host(folder.mount, path), path, mustBeFolder };
  }

  #resolve(
    folder: OpenFolder,
    raw: Uint8Array,
  ): { readonly path: readonly string[]; readonly mustBeFolder: boolean } {
    if (raw.length > MAX_PATH_BYTES) throw new Refusal(ERRNO.nametoolong);
    let text: string;
    try {
      text = utf8.decode(raw);
    } catch {
      throw new Refusal(ERRNO.inval);
    }
    if (text === '') throw new Refusal(ERRNO.noent);
    if (text.includes('\0')) throw new Refusal(ERRNO.inval);
    if (text.startsWith('/')) throw new Refusal(ERRNO.notcapable);
    const path = [...folder.path];
    for (const part of text.split('/')) {
      if (part === '' || part === '.') continue;
      if (part !== '..') path.push(part);
      // Not out of the folder the descriptor stands for, even where the mount goes further up.
      else if (path.length > folder.path.length) path.pop();
      else throw new Refusal(ERRNO.notcapable);
    }
    if (path.length > MAX_DEPTH) throw new Refusal(ERRNO.nametoolong);
    return { path, mustBeFolder: /(?:^|\/)\.{0,2}$/.test(text) };
  }

  /** The path on the machine, each folder on the way seen to be one. */
  #host(mount: Mount, path: readonly string[]): string {
    let host = mount.hostPath;
    for (const [index, part] of path.entries()) {
      if (index > 0) {
        const found = lstatSync(host);
        if (found.isSymbolicLink()) throw new Refusal(ERRNO.loop);
        if (!found.isDirectory()) throw new Refusal(ERRNO.notdir);
      }
      host = `${host}/${part}`;
    }
    return host;
  }

  #statAt(mount: Mount, path: readonly string[]): BigIntStats {
    return lstatSync(this.#host(mount, path), { bigint: true });
  }

  #resize(fd: number, from: number, to: number): void {
    this.#measured();
    if (to > from) this.#takeBytes(to - from);
    try {
      ftruncateSync(fd, to);
    } catch (error) {
      if (to > from) this.#giveBytes(to - from);
      throw error;
    }
    if (to < from) this.#giveBytes(from - to);
  }

  #takeFile(): void {
    const taken = this.#measured();
    if (taken.files >= this.#limits.maxFiles) throw new Refusal(ERRNO.dquot);
    taken.files += 1;
  }

  #giveFile(): void {
    const taken = this.#measured();
    taken.files = Math.max(0, taken.files - 1);
  }

  /** A name is gone; the bytes behind it only when nothing has them open. */
  #gone(found: Stats): void {
    this.#giveFile();
    if (found.isFile() && !this.#isOpen(found.ino)) this.#giveBytes(found.size);
  }

  #isOpen(inode: number): boolean {
    for (const one of this.#open.values()) if (one.kind === 'file' && one.inode === inode) return true;
    return false;
  }

  #takeBytes(bytes: number): void {
    if (bytes === 0) return;
    const taken = this.#measured();
    if (taken.bytes + bytes > this.#limits.maxStorageBytes) throw new Refusal(ERRNO.dquot);
    taken.bytes += bytes;
  }

  #giveBytes(bytes: number): void {
    const taken = this.#measured();
    taken.bytes = Math.max(0, taken.bytes - bytes);
  }

  #measured(): { bytes: number; files: number } {
    if (this.#taken !== null) return this.#taken;
    const taken = { bytes: 0, files: 0 };
    for (const mount of this.#mounts) if (mount.writable) measure(mount.hostPath, taken);
    this.#taken = taken;
    return taken;
  }
}

export interface TimesRequest {
  /** Of {@link SET_TIMES}. */
  readonly flags: number;
  readonly atimNs: bigint;
  readonly mtimNs: bigint;
}

function timesOf(
  { flags, atimNs, mtimNs }: TimesRequest,
  { atime, mtime }: { readonly atime: Date; readonly mtime: Date },
): { readonly atime: Date | number; readonly mtime: Date | number } {
  const both = (first: number, second: number): boolean => (flags & first) !== 0 && (flags & second) !== 0;
  if (both(SET_TIMES.atim, SET_TIMES.atimNow) || both(SET_TIMES.mtim, SET_TIMES.mtimNow)) {
    throw new Refusal(ERRNO.inval);
  }
  const pick = (set: number, now: number, ns: bigint, kept: Date): Date | number => {
    if (flags & now) return new Date();
    return flags & set ? Number(ns / 1_000n) / 1e6 : kept;
  };
  return {
    atime: pick(SET_TIMES.atim, SET_TIMES.atimNow, atimNs, atime),
    mtime: pick(SET_TIMES.mtim, SET_TIMES.mtimNow, mtimNs, mtime),
  };
}

function measure(folder: string, sum: { bytes: number; files: number }): void {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = `${folder}/${entry.name}`;
    sum.files += 1;
    if (entry.isDirectory()) measure(path, sum);
    else sum.bytes += lstatSync(path, { throwIfNoEntry: false })?.size ?? 0;
  }
}
