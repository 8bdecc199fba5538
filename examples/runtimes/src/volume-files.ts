/** The two volumes of both examples, and the files in them by the paths requestors use. */
import { createReadStream, createWriteStream, type ReadStream, type WriteStream } from 'node:fs';
import path from 'node:path';
import { RuntimeError, type Volume } from '@millrace/runtime';

export const VOLUMES: readonly Volume[] = [
  { name: 'vol-in', path: '/in' },
  { name: 'vol-out', path: '/out' },
];

/** Where `/in/name` or `/out/name` is on the machine. */
export function locate(workdir: string, inside: string): string {
  const [, folder, rest = ''] = /^(\/in|\/out)\/(.+)$/.exec(path.posix.normalize(inside)) ?? [];
  const volume = VOLUMES.find((one) => one.path === folder);
  if (!volume) throw new RuntimeError(`${inside} is neither in /in nor in /out`, { exitCode: 2 });
  return path.join(workdir, volume.name, rest);
}

export function openInput(workdir: string, inside: string): ReadStream {
  return createReadStream(locate(workdir, inside));
}

export function openOutput(workdir: string, inside: string): WriteStream {
  if (!inside.startsWith('/out/')) throw new RuntimeError(`${inside} is not in /out`, { exitCode: 2 });
  return createWriteStream(locate(workdir, inside));
}
