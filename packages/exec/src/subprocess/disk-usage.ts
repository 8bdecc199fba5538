/** How much disk a program's folder takes, as far as it can be looked into. */
import { lstat, readdir } from 'node:fs/promises';
import { join } from 'node:path';

/** Stops counting at `enough`. Blocks in use, so that files with holes count for what they hold. */
export async function diskUsage(folders: readonly string[], enough: number): Promise<number> {
  let bytes = 0;
  const queue = [...folders];
  for (let folder = queue.pop(); folder !== undefined && bytes <= enough; folder = queue.pop()) {
    // It may vanish, or be closed to us by the program whose it is.
    const entries = await readdir(folder, { withFileTypes: true }).catch(() => []);
    for (const entry of entries) {
      const path = join(folder, entry.name);
      bytes += ((await lstat(path).catch(() => null))?.blocks ?? 0) * 512;
      if (entry.isDirectory()) queue.push(path);
      if (bytes > enough) break;
    }
  }
  return bytes;
}
