/** Error numbers of WASI preview 1, and what an error of the machine's file system is there. */

export const ERRNO = {
  success: 0,
  '2big': 1,
  acces: 2,
  badf: 8,
  busy: 10,
  dquot: 19,
  exist: 20,
  fault: 21,
  fbig: 22,
  inval: 28,
  io: 29,
  isdir: 31,
  loop: 32,
  mfile: 33,
  nametoolong: 37,
  noent: 44,
  nospc: 51,
  notdir: 54,
  notempty: 55,
  notsup: 58,
  perm: 63,
  rofs: 69,
  spipe: 70,
  xdev: 75,
  notcapable: 76,
} as const;

const BY_CODE: Readonly<Record<string, number>> = {
  E2BIG: ERRNO['2big'],
  EACCES: ERRNO.acces,
  EBADF: ERRNO.badf,
  EBUSY: ERRNO.busy,
  EDQUOT: ERRNO.dquot,
  EEXIST: ERRNO.exist,
  EFBIG: ERRNO.fbig,
  EINVAL: ERRNO.inval,
  EISDIR: ERRNO.isdir,
  ELOOP: ERRNO.loop,
  EMFILE: ERRNO.mfile,
  ENFILE: ERRNO.mfile,
  ENAMETOOLONG: ERRNO.nametoolong,
  ENOENT: ERRNO.noent,
  ENOSPC: ERRNO.nospc,
  ENOTDIR: ERRNO.notdir,
  ENOTEMPTY: ERRNO.notempty,
  EPERM: ERRNO.perm,
  EROFS: ERRNO.rofs,
  EXDEV: ERRNO.xdev,
};

/** A guest's mistake, as its errno. */
export class Refusal extends Error {
  readonly errno: number;

  constructor(errno: number) {
    super(`errno ${errno}`);
    this.errno = errno;
  }
}

/** The errno for what a call of the file system threw. @throws `error` itself when it is none of the system's: a bug. */
export function errnoOf(error: unknown): number {
  if (error instanceof Refusal) return error.errno;
  const { code } = error as NodeJS.ErrnoException;
  if (typeof code !== 'string' || (error as NodeJS.ErrnoException).errno === undefined) throw error;
  return BY_CODE[code] ?? ERRNO.io;
}
