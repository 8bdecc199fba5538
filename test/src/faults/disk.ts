/** A disk that can be filled: a small file system in memory, mounted for a test. Only root may. */
import { spawnSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, rmSync, rmdirSync, statfsSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';

export class SmallDisk implements Disposable {
  readonly path: string;

  /** @throws Error when it cannot be mounted */
  constructor(mebibytes: number) {
    this.path = mkdtempSync(path.join(tmpdir(), 'millrace-disk-'));
    const mounted = spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${mebibytes}m`, 'tmpfs', this.path], {
      encoding: 'utf8',
    });
    if (mounted.status === 0) return;
    rmdirSync(this.path);
    throw new Error(`a tmpfs cannot be mounted: ${mounted.error?.message ?? mounted.stderr.trim()}`);
  }

  /** Leaves no byte free. */
  fill(): void {
    const block = Buffer.alloc(64 * 1024, 1);
    const file = openSync(this.#ballast, 'a');
    try {
      for (let size = block.length; size >= 1;) {
        try {
          writeSync(file, block, 0, size);
        } catch (error) {
          if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
          size = Math.floor(size / 2);
        }
      }
    } finally {
      closeSync(file);
    }
  }

  /** Takes away what {@link fill} put there. */
  free(): void {
    rmSync(this.#ballast, { force: true });
  }

  get freeBytes(): number {
    const { bavail, bsize } = statfsSync(this.path);
    return bavail * bsize;
  }

  [Symbol.dispose](): void {
    // Lazily: a process that is ending may still have a file open.
    spawnSync('umount', ['--lazy', this.path]);
    rmdirSync(this.path);
  }

  get #ballast(): string {
    return path.join(this.path, 'ballast');
  }
}

/**
 * True when tests must be skipped because nothing can be mounted, and then says why. No package brings the right to mount, so
 * that is no failure on CI either; anything else that is missing is.
 */
export function withoutSmallDisk(): boolean {
  try {
    new SmallDisk(1)[Symbol.dispose]();
    return false;
  } catch (error) {
    if (process.env['CI'] && !/permission denied|only root|must be superuser/i.test(String(error)))
      throw error;
    process.stderr.write(`tests with a full disk are skipped: ${String(error)}\n`);
    return true;
  }
}
