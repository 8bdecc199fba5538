/**
 * The other queues that figures are printed beside, behind one small face: add jobs, work on them, know when the server has
 * stored the ending. Each is used as its own documentation says, once with its defaults and once with the settings it
 * recommends for throughput.
 */
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';

export const PEER_NAMES = ['bullmq', 'bee-queue', 'graphile-worker', 'pg-boss'] as const;
export type PeerName = (typeof PEER_NAMES)[number];

/** As installed, or as its authors advise for many short jobs. */
export type PeerSettings = 'default' | 'tuned';

export type Payload = Readonly<Record<string, string | number>>;
/** Runs in the worker's own thread, as these libraries do it. What it returns is the job's result. */
export type PeerHandler = (payload: Payload) => Promise<string> | string;

export interface Peer {
  readonly server: 'redis' | 'postgres';
  /** What the settings are, for the report. */
  readonly settings: Readonly<Record<PeerSettings, string>>;
  /** A queue of its own on that server. One at a time on a server. */
  open(url: string, settings: PeerSettings): Promise<PeerQueue>;
}

export interface PeerQueue extends AsyncDisposable {
  /** Adds all, with the calls that the settings mean, each after the one before has been answered. */
  add(payloads: readonly Payload[]): Promise<void>;
  /** Starts a worker in this process. Once. */
  work(handler: PeerHandler): Promise<void>;
  /** Resolves when this process's worker has had so many completions confirmed by the server. */
  completed(count: number): Promise<void>;
  /** Adds one job and resolves with its result, as a requestor hears of it. After {@link work}. */
  run(payload: Payload): Promise<string>;
  /** What the server says of the one job that was ever added: its state, and how often it was begun where that is told. */
  standing(): Promise<{ readonly ended: boolean; readonly text: string }>;
}

const LOADERS: Readonly<Record<PeerName, () => Promise<Peer>>> = {
  bullmq: async () => (await import('./bullmq.ts')).bullmq,
  'bee-queue': async () => (await import('./bee-queue.ts')).beeQueue,
  'graphile-worker': async () => (await import('./graphile-worker.ts')).graphileWorker,
  'pg-boss': async () => (await import('./pg-boss.ts')).pgBoss,
};

/** Loads only the peer that is asked for. */
export async function loadPeer(name: PeerName): Promise<Peer> {
  return await LOADERS[name]();
}

/** Why it is not the newest of all releases, where it is not. Looked up on 24 November 2026. */
const OLDER_BECAUSE: Readonly<Partial<Record<PeerName, string>>> = {
  'graphile-worker': '0.18.0 needs Node 22.18',
  'pg-boss': '11 needs Node 22, 12.38.0 needs Node 22.12',
};

/** Name, installed version, the Node it asks for, and why not a newer one. */
export function peerVersion(name: PeerName): string {
  const { version, engines } = manifestOf(name);
  const older = OLDER_BECAUSE[name];
  return `${name} ${version} (node ${engines?.node ?? 'any'}; ${older === undefined ? 'the newest' : `newest for Node 20: ${older}`})`;
}

interface Manifest {
  readonly name?: string;
  readonly version: string;
  readonly engines?: { readonly node?: string };
}

/** Not every package exports its package.json. */
function manifestOf(name: PeerName): Manifest {
  let folder = path.dirname(createRequire(import.meta.url).resolve(name));
  for (;;) {
    try {
      const manifest = JSON.parse(readFileSync(path.join(folder, 'package.json'), 'utf8')) as Manifest;
      if (manifest.name === name) return manifest;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
    const parent = path.dirname(folder);
    if (parent === folder) throw new Error(`${name} has no package.json above ${import.meta.url}`);
    folder = parent;
  }
}

/** The parts of a list, each of at most `size`. */
export function* chunksOf<T>(items: readonly T[], size: number): Generator<readonly T[]> {
  for (let at = 0; at < items.length; at += size) yield items.slice(at, at + size);
}

/** Counts completions and tells when there were enough. */
export class CompletionCount {
  #done = 0;
  #wanted = 0;
  #reached: (() => void) | null = null;

  add(count: number): void {
    this.#done += count;
    if (this.#reached !== null && this.#done >= this.#wanted) this.#reached();
  }

  async reach(count: number): Promise<void> {
    if (this.#done >= count) return;
    this.#wanted = count;
    await new Promise<void>((resolve) => {
      this.#reached = resolve;
    });
    this.#reached = null;
  }
}
