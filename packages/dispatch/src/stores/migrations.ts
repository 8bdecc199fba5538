/** The numbered SQL files of a store. Applied in order, each exactly once, and never changed afterwards. */
import { createHash } from 'node:crypto';
import { readFileSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

export interface Migration {
  readonly id: number;
  /** The file's name. */
  readonly name: string;
  /** SHA-256 of the file, hex. */
  readonly checksum: string;
  readonly sql: string;
}

/** The files of `sql/<folder>`, in order. The folder is at the same place relative to `src` and to `dist`. */
export function readMigrations(folder: 'sqlite' | 'postgres'): Migration[] {
  const path = fileURLToPath(new URL(`../../sql/${folder}/`, import.meta.url));
  return readdirSync(path)
    .filter((name) => /^\d{4}-.+\.sql$/.test(name))
    .toSorted()
    .map((name) => {
      const sql = readFileSync(`${path}${name}`, 'utf8');
      return {
        id: Number(name.slice(0, 4)),
        name,
        checksum: createHash('sha256').update(sql).digest('hex'),
        sql,
      };
    });
}
