/**
 * A real S3 server for tests: Ceph's gateway over one monitor and one storage daemon that keeps everything in memory, started from
 * the machine's packages in a folder of its own, on free ports of the loopback, and gone afterwards. Once for a test file.
 */
import { execFile, spawn, type ChildProcess } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  closeSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { promisify } from 'node:util';
import { CreateBucketCommand, PutBucketPolicyCommand, S3Client } from '@aws-sdk/client-s3';
import { SimulatedClock } from '@millrace/runner/testing';
import { request } from 'undici';
import type { BlobStore } from './blobs.ts';
import { openS3Blobs } from './blobs/s3.ts';
import { openDomainStorage } from './client/http-domain.ts';
import type { Dispatcher } from './dispatcher.ts';
import { openDispatcher } from './server.ts';
import type { Store } from './store.ts';
import { openSqliteStore } from './stores/sqlite.ts';

const PROGRAMS = ['ceph-mon', 'ceph-osd', 'radosgw', 'radosgw-admin', 'ceph-authtool', 'monmaptool', 'ceph'];

const run = promisify(execFile);

/** Everything it takes, or why not. */
function missingPrograms(): string | null {
  const folders = (process.env['PATH'] ?? '').split(delimiter).filter((folder) => folder !== '');
  const missing = PROGRAMS.filter((name) => !folders.some((folder) => existsSync(join(folder, name))));
  if (missing.length === 0) return null;
  return `${missing.join(', ')} not on PATH; install radosgw, ceph-mon and ceph-osd`;
}

/**
 * True when tests must be skipped for want of a server, and then says why. On CI it is a failure instead: there, everything
 * has to run.
 */
export function withoutS3(): boolean {
  const missing = missingPrograms();
  if (missing === null) return false;
  if (process.env['CI']) throw new Error(missing);
  process.stderr.write(`tests over S3 are skipped: ${missing}\n`);
  return true;
}

async function freePorts(count: number): Promise<number[]> {
  const probes = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'));
  const ports: number[] = [];
  for (const probe of probes) {
    if (!probe.listening) await once(probe, 'listening');
    ports.push((probe.address() as AddressInfo).port);
  }
  for (const probe of probes) {
    probe.close();
    await once(probe, 'close');
  }
  return ports;
}

export interface TestCredentials {
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
}

/** The bucket's owner. */
export const OWNER: TestCredentials = { accessKeyId: 'OWNERKEY', secretAccessKey: 'owner/secret+1' };
/** Somebody who may do only what a bucket's policy says. */
export const GUEST: TestCredentials = { accessKeyId: 'GUESTKEY', secretAccessKey: 'guest/secret+2' };

export class S3Server implements AsyncDisposable {
  readonly endpoint: string;
  readonly port: number;
  readonly #folder: string;
  readonly #monitorPort: number;
  readonly #daemons: ChildProcess[] = [];
  readonly #killAll = (): void => {
    for (const daemon of this.#daemons) daemon.kill('SIGKILL');
  };
  #client: S3Client | null = null;
  #buckets = 0;

  private constructor(folder: string, monitorPort: number, port: number) {
    this.#folder = folder;
    this.#monitorPort = monitorPort;
    this.port = port;
    this.endpoint = `http://127.0.0.1:${port}`;
  }

  /** Several seconds, most of them waiting for the daemons to find each other. */
  static async start(): Promise<S3Server> {
    const [monitor, gateway] = (await freePorts(2)) as [number, number];
    const server = new S3Server(mkdtempSync(join(tmpdir(), 'millrace-s3-')), monitor, gateway);
    // Whoever ends this process without a word must not leave four daemons behind.
    process.once('exit', server.#killAll);
    try {
      await server.#start();
    } catch (error) {
      const said = server.#lastWords();
      await server[Symbol.asyncDispose]();
      throw new Error(`the S3 server did not start:\n${said}`, { cause: error });
    }
    return server;
  }

  /** A new bucket of the owner; `guest`: the actions the other user has. */
  async createBucket(options: { readonly guest?: readonly string[] } = {}): Promise<string> {
    const client = (this.#client ??= new S3Client({
      endpoint: this.endpoint,
      region: 'us-east-1',
      forcePathStyle: true,
      credentials: OWNER,
      requestChecksumCalculation: 'WHEN_REQUIRED',
    }));
    this.#buckets += 1;
    const Bucket = `test-${this.#buckets}`;
    await client.send(new CreateBucketCommand({ Bucket }));
    if (options.guest !== undefined) {
      const Policy = JSON.stringify({
        Version: '2012-10-17',
        Statement: [
          {
            Effect: 'Allow',
            Principal: { AWS: ['arn:aws:iam:::user/guest'] },
            Action: options.guest,
            Resource: [`arn:aws:s3:::${Bucket}`, `arn:aws:s3:::${Bucket}/*`],
          },
        ],
      });
      await client.send(new PutBucketPolicyCommand({ Bucket, Policy }));
    }
    return Bucket;
  }

  /** The URL blobs are opened by. */
  url(bucket: string, prefix = '', more = ''): string {
    return `s3://${bucket}/${prefix}?endpoint=${this.endpoint}${more}`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#client?.destroy();
    await Promise.all(
      this.#daemons.map(async (daemon) => {
        if (daemon.exitCode !== null || daemon.signalCode !== null || daemon.pid === undefined) return;
        const exited = once(daemon, 'exit');
        daemon.kill('SIGKILL');
        await exited;
      }),
    );
    process.off('exit', this.#killAll);
    rmSync(this.#folder, { recursive: true, force: true });
  }

  async #start(): Promise<void> {
    const folder = this.#folder;
    const cluster = randomUUID();
    for (const name of ['mon', 'osd', 'gateway']) mkdirSync(join(folder, name));
    writeFileSync(join(folder, 'ceph.conf'), this.#settings(cluster));
    const ring = join(folder, 'keyring');
    const keys: readonly (readonly [string, ...string[]])[] = [
      ['mon.', 'mon', 'allow *'],
      ['client.admin', 'mon', 'allow *', 'osd', 'allow *'],
      ['client.rgw', 'mon', 'allow rwx', 'osd', 'allow rwx'],
      ['osd.0', 'mon', 'allow profile osd', 'osd', 'allow *'],
    ];
    for (const [index, [name, ...rights]] of keys.entries()) {
      const caps: string[] = [];
      for (let at = 0; at < rights.length; at += 2) caps.push('--cap', rights[at]!, rights[at + 1]!);
      await run('ceph-authtool', [
        ...(index === 0 ? ['--create-keyring'] : []),
        ring,
        '--gen-key',
        '-n',
        name,
        ...caps,
      ]);
    }
    const map = join(folder, 'monmap');
    const monitor = `[v2:127.0.0.1:${this.#monitorPort}]`;
    await run('monmaptool', ['--create', '--fsid', cluster, '--addv', 'a', monitor, map]);
    await this.#ceph('ceph-mon', ['-i', 'a', '--mkfs', '--monmap', map, '--keyring', ring]);
    this.#daemon('ceph-mon', ['-i', 'a']);
    const disk = randomUUID();
    await this.#ceph('ceph', ['--connect-timeout', '60', 'osd', 'new', disk, '0']);
    await this.#ceph('ceph-osd', ['-i', '0', '--mkfs', '--osd-uuid', disk]);
    this.#daemon('ceph-osd', ['-i', '0']);
    const gateway = this.#daemon('radosgw', ['-n', 'client.rgw']);
    await this.#answering(gateway);
    for (const [name, key] of [
      ['owner', OWNER],
      ['guest', GUEST],
    ] as const) {
      const { accessKeyId, secretAccessKey } = key;
      const user = [
        `--uid=${name}`,
        `--display-name=${name}`,
        `--access-key=${accessKeyId}`,
        `--secret-key=${secretAccessKey}`,
      ];
      await this.#ceph('radosgw-admin', ['user', 'create', ...user]);
    }
  }

  #settings(cluster: string): string {
    const folder = this.#folder;
    const lines = {
      fsid: cluster,
      mon_initial_members: 'a',
      mon_host: `[v2:127.0.0.1:${this.#monitorPort}]`,
      public_addr: '127.0.0.1',
      cluster_addr: '127.0.0.1',
      keyring: join(folder, 'keyring'),
      run_dir: folder,
      admin_socket: '',
      pid_file: '',
      log_file: '/dev/null',
      log_to_stderr: 'true',
      mon_cluster_log_to_file: 'false',
      crash_dir: folder,
      mon_data: join(folder, 'mon'),
      osd_data: join(folder, 'osd'),
      osd_objectstore: 'memstore',
      memstore_device_bytes: 4 * 1024 ** 3,
      osd_pool_default_size: 1,
      osd_pool_default_min_size: 1,
      osd_pool_default_pg_num: 4,
      osd_pool_default_pgp_num: 4,
      osd_pool_default_pg_autoscale_mode: 'off',
      mon_allow_pool_size_one: 'true',
      mon_max_pg_per_osd: 1000,
      // The disk of whoever runs the tests may be rather full.
      mon_data_avail_crit: 0,
      osd_crush_chooseleaf_type: 0,
      ms_bind_ipv6: 'false',
      // Nearly all of the start is waiting for the monitor to put one change after the other.
      paxos_propose_interval: 0.02,
      paxos_min_wait: 0.01,
      rgw_data: join(folder, 'gateway'),
      rgw_frontends: `beast endpoint=127.0.0.1:${this.port}`,
      rgw_thread_pool_size: 32,
    };
    return ['[global]', ...Object.entries(lines).map(([name, value]) => `${name} = ${value}`), ''].join('\n');
  }

  async #ceph(program: string, args: readonly string[]): Promise<void> {
    await run(program, ['-c', join(this.#folder, 'ceph.conf'), ...args], { timeout: 90_000 });
  }

  #daemon(program: string, args: readonly string[]): ChildProcess {
    const log = openSync(join(this.#folder, `${program}.log`), 'w');
    const daemon = spawn(program, ['-c', join(this.#folder, 'ceph.conf'), ...args, '-f'], {
      cwd: this.#folder,
      stdio: ['ignore', log, log],
    });
    closeSync(log);
    this.#daemons.push(daemon);
    return daemon;
  }

  async #answering(gateway: ChildProcess): Promise<void> {
    const deadline = performance.now() + 90_000;
    for (;;) {
      if (gateway.exitCode !== null) throw new Error(`radosgw ended with ${gateway.exitCode}`);
      const answer = await request(this.endpoint).catch(() => null);
      await answer?.body.dump();
      if (answer !== null) return;
      if (performance.now() > deadline) throw new Error('radosgw did not answer within 90 s');
      await new Promise((resolve) => void setTimeout(resolve, 50));
    }
  }

  #lastWords(): string {
    return ['ceph-mon', 'ceph-osd', 'radosgw']
      .map((name) => {
        const file = join(this.#folder, `${name}.log`);
        return existsSync(file)
          ? `${name}: ${readFileSync(file, 'utf8').slice(-2000)}`
          : `${name}: not started`;
      })
      .join('\n');
  }
}

/** Stands between a client and the server, and does to connections what networks do. */
export class BadNetwork implements AsyncDisposable {
  readonly endpoint: string;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  /** Looks at bytes of the client before they go on. False cuts the connection instead; a promise holds them. */
  onRequest: (bytes: Buffer) => boolean | Promise<boolean> = () => true;
  /** The same for bytes of the server. */
  onAnswer: (bytes: Buffer) => boolean = () => true;

  private constructor(server: Server) {
    this.#server = server;
    this.endpoint = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  }

  static async start(port: number): Promise<BadNetwork> {
    const server = createServer();
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const network = new BadNetwork(server);
    server.on('connection', (client) => network.#join(client, connect(port, '127.0.0.1')));
    return network;
  }

  /** Every open connection, at once. */
  cut(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.cut();
    this.#server.close();
    await once(this.#server, 'close');
  }

  #join(client: Socket, server: Socket): void {
    const end = (): void => {
      client.destroy();
      server.destroy();
    };
    for (const socket of [client, server]) {
      this.#sockets.add(socket);
      socket.on('error', end);
      socket.on('close', () => {
        this.#sockets.delete(socket);
        end();
      });
    }
    client.on('data', (bytes: Buffer) => {
      const passes = this.onRequest(bytes);
      if (typeof passes === 'boolean') {
        if (!passes) end();
        else if (!server.write(bytes)) {
          client.pause();
          server.once('drain', () => client.resume());
        }
        return;
      }
      client.pause();
      void passes.then((pass) => {
        if (!pass) end();
        else server.write(bytes);
        client.resume();
      });
    });
    server.on('data', (bytes: Buffer) => {
      if (!this.onAnswer(bytes)) end();
      else if (!client.write(bytes)) {
        server.pause();
        client.once('drain', () => server.resume());
      }
    });
  }
}

/** A dispatcher over the bucket that a URL names, and a client of it. */
export class BucketDispatcher implements AsyncDisposable {
  readonly clock = new SimulatedClock();
  readonly blobs: BlobStore;
  readonly store: Store;
  readonly dispatcher: Dispatcher;
  readonly token: string;
  readonly storage: ReturnType<typeof openDomainStorage>;

  private constructor(blobs: BlobStore, store: Store, dispatcher: Dispatcher, token: string) {
    this.blobs = blobs;
    this.store = store;
    this.dispatcher = dispatcher;
    this.token = token;
    this.storage = openDomainStorage({
      baseUrl: dispatcher.url,
      clientId: 'test',
      token: () => token,
      clock: this.clock,
    });
  }

  static async open(url: string): Promise<BucketDispatcher> {
    const blobs = await openS3Blobs({ url, credentials: OWNER });
    const store = await openSqliteStore({ path: ':memory:' });
    const dispatcher = await openDispatcher({ store, blobs, port: 0 });
    return new BucketDispatcher(blobs, store, dispatcher, await dispatcher.issueClientToken());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.storage[Symbol.asyncDispose]();
    await this.dispatcher.close();
    await this.store[Symbol.asyncDispose]();
    await this.blobs[Symbol.asyncDispose]();
  }
}
