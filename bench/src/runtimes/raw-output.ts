/** The peer of the runtime's output: the same bytes through a pipe, with nothing around them. */
import { once } from 'node:events';

const CHUNK = Buffer.alloc(64 * 1024, 'x');
for (let left = Number(process.argv[2]); left > 0; left -= CHUNK.length) {
  if (!process.stdout.write(CHUNK)) await once(process.stdout, 'drain');
}
