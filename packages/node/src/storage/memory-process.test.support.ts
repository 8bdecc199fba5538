/** The two processes of `memory.test.ts`. */
import { createHash } from 'node:crypto';
import { open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { openDispatcher, openFileBlobs, openSqliteStore } from '@millrace/dispatch';
import { parseLease, systemClock, type Logger } from '@millrace/runner';
import { openStoragePorts } from './ports.ts';

const { DIR = '', URL_OF = '', TOKEN = '', DOMAIN = '' } = process.env;
const CHUNK = 1024 * 1024;

interface Request {
  readonly watch?: boolean;
  readonly way?: string;
  readonly size?: number;
}

let base = 0;
let peak = 0;
let timer: NodeJS.Timeout | undefined;

/** Resident memory while watched, sampled often enough for transfers of seconds. */
function watch(on: boolean): { readonly growth: number } {
  clearInterval(timer);
  const sample = (): void => {
    peak = Math.max(peak, process.memoryUsage.rss());
  };
  if (on) {
    base = process.memoryUsage.rss();
    peak = base;
    timer = setInterval(sample, 10);
  } else {
    sample();
  }
  return { growth: peak - base };
}

function serve(perform: (request: Request) => Promise<object>): void {
  process.on('message', (request: Request) => {
    const answering = request.watch === undefined ? perform(request) : Promise.resolve(watch(request.watch));
    answering.then(
      (answer) => process.send?.(answer),
      (error: unknown) => process.send?.({ error: error instanceof Error ? error.stack : String(error) }),
    );
  });
  process.on('disconnect', () => process.exit());
}

async function runDispatcher(): Promise<void> {
  const store = await openSqliteStore({ path: join(DIR, 'store.db') });
  const blobs = await openFileBlobs({ dir: join(DIR, 'blobs') });
  const dispatcher = await openDispatcher({ store, blobs, port: 0 });
  serve(() => Promise.resolve({}));
  process.send?.({
    url: dispatcher.url,
    token: await dispatcher.issueClientToken(),
    domain: dispatcher.defaultDomainId,
  });
}

const silent: Logger = { debug() {}, info() {}, warn() {}, error() {}, child: () => silent };

/** Bytes that are the same every time, from one buffer. */
async function* bytesOf(size: number): AsyncGenerator<Uint8Array> {
  const chunk = Buffer.alloc(CHUNK);
  for (let at = 0; at < size; at += CHUNK) {
    chunk.writeUInt32BE(at / CHUNK, 0);
    yield chunk;
  }
}

async function digestOf(chunks: AsyncIterable<Uint8Array>): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of chunks) hash.update(chunk);
  return hash.digest('hex');
}

function runNode(): void {
  const path = join(DIR, 'task');
  const domain = { id: DOMAIN, serverUrl: URL_OF };
  const ports = openStoragePorts({
    lease: parseLease({
      domain_id: DOMAIN,
      domain_server_url: URL_OF,
      task: { id: 'aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee', capability: '/test/v1' },
    }),
    leaseId: null,
    domain: () => domain,
    token: () => TOKEN,
    refreshToken: () => Promise.reject(new Error('the token is good')),
    folder: { path, create: () => Promise.resolve(path), remove: () => Promise.resolve() },
    signal: new AbortController().signal,
    log: silent,
    clientId: 'memory-test',
    clock: systemClock,
    random: Math.random,
  });

  const put = async (way: string, size: number): Promise<void> => {
    const { output } = ports;
    if (way === 'putFile') {
      const file = join(DIR, 'file');
      const handle = await open(file, 'w');
      for await (const chunk of bytesOf(size)) await handle.writeFile(chunk);
      await handle.close();
      await output.putFile('artifact', file);
      await rm(file);
    } else {
      const upload = await output.openMultipart('artifact');
      for await (const chunk of bytesOf(size)) await upload.writeChunk(chunk);
      await upload.finish();
    }
  };

  serve(async ({ way = '', size = 0 }) => {
    if (way === 'openRead' || way === 'materializeCidToTemp') {
      const cid = ports.artifacts()[0]?.id ?? '';
      if (way === 'openRead') {
        const got = await digestOf(await ports.input.openRead(cid));
        if (got !== (await digestOf(bytesOf(size)))) throw new Error('openRead gave other bytes');
      } else {
        const { root_dir, path: file } = await ports.input.materializeCidWithMeta(cid);
        const handle = await open(file);
        const got = await digestOf(handle.createReadStream());
        if (got !== (await digestOf(bytesOf(size)))) throw new Error('materializeCidToTemp gave other bytes');
        await rm(root_dir, { recursive: true });
      }
    } else {
      await put(way, size);
    }
    return {};
  });
  process.send?.({});
}

if (process.argv[2] === 'dispatcher') await runDispatcher();
else runNode();
