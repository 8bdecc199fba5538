/** A peer's worker as a process of its own: `worker.js NAME URL SETTINGS`. Says `ready` when it works, until it is killed. */
import { performNoted, type NotedTask } from './notes.ts';
import { loadPeer, type PeerName, type PeerSettings } from './peer.ts';

const [name, url, settings] = process.argv.slice(2) as [PeerName, string, PeerSettings];
const peer = await loadPeer(name);
const queue = await peer.open(url, settings);
await queue.work(async (payload) => {
  await performNoted(payload as unknown as NotedTask);
  return 'done';
});
process.stdout.write('ready\n');
