/**
 * A container engine for tests: Podman from the system's packages, as a service of its own with its own storage, in a folder of its own, with
 * one image made of the system's static busybox. Needs root, as the packages alone do not make Podman rootless.
 */
import { execFile, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { copyFile, mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { promisify } from 'node:util';
import { sleep, systemClock } from '@millrace/runner';
import { ContainerEngine } from './engine.ts';

const run = promisify(execFile);
const BUSYBOX = ['/bin/busybox', '/usr/bin/busybox'];
const APPLETS =
  'sh ash cat chmod dd df echo env false grep head hostname id kill ln ls mkdir mkfifo mv nproc printf ps pwd readlink rm seq sleep sort stat tail test touch tr true ulimit wc wget yes';

export interface TestEngine extends AsyncDisposable {
  readonly host: string;
  /** The busybox image, by name and by digest. */
  readonly image: string;
  readonly pinnedImage: string;
  /** Runs the podman command on the same storage. */
  podman(...args: string[]): Promise<string>;
  /** Kills the service; its containers live on, as after a crash of the engine. */
  kill(): Promise<void>;
  /** Starts the service, again. */
  start(): Promise<void>;
  /** Names of all containers there are. */
  containers(): Promise<string[]>;
}

/**
 * An engine that has just run a container; or null where there can be none, with the reason on stderr.
 *
 * @throws Error instead of null when something is missing and `CI` is set, so that the tests cannot be lost unnoticed there
 */
export async function openPodman(): Promise<TestEngine | null> {
  const missing = missingPrograms();
  const reason =
    missing.length > 0
      ? `${missing.join(', ')} not found; apt-get install --no-install-recommends podman runc busybox-static`
      : process.getuid?.() === 0
        ? null
        : 'they need root';
  if (reason === null) return await PodmanService.open();
  if (missing.length > 0 && process.env['CI'] === 'true')
    throw new Error(`the container tests cannot run: ${reason}`);
  process.stderr.write(`skipped the container tests: ${reason}\n`);
  return null;
}

function missingPrograms(): string[] {
  const path = (process.env['PATH'] ?? '').split(delimiter);
  const programs = ['podman', 'conmon', 'runc'].filter(
    (name) => !path.some((dir) => existsSync(join(dir, name))),
  );
  return BUSYBOX.some((file) => existsSync(file)) ? programs : [...programs, 'busybox'];
}

class PodmanService implements TestEngine {
  readonly host: string;
  readonly image = 'localhost/millrace-test:latest';
  pinnedImage = '';
  readonly #dir: string;
  #service: ChildProcess | null = null;

  static async open(): Promise<PodmanService> {
    const service = new PodmanService(await mkdtemp(join(tmpdir(), 'mr-podman-')));
    try {
      await service.#prepare();
      await service.start();
      await service.podman('run', '--rm', '--network=none', service.image, 'true');
      return service;
    } catch (error) {
      await service[Symbol.asyncDispose]();
      throw error;
    }
  }

  constructor(dir: string) {
    this.#dir = dir;
    this.host = `unix://${dir}/podman.sock`;
  }

  async podman(...args: string[]): Promise<string> {
    const { stdout } = await run('podman', [...this.#flags(), ...args], { cwd: this.#dir, env: this.#env() });
    return stdout.trim();
  }

  async start(): Promise<void> {
    await rm(join(this.#dir, 'podman.sock'), { force: true });
    this.#service = spawn('podman', [...this.#flags(), 'system', 'service', '--time', '0', this.host], {
      // What watches over a container leaves a file where it was started when memory runs out.
      cwd: this.#dir,
      env: this.#env(),
      stdio: 'ignore',
    });
    await using engine = new ContainerEngine({ host: this.host });
    for (let tries = 0; ; tries += 1) {
      try {
        return await engine.ping();
      } catch (error) {
        if (tries >= 500 || this.#service.exitCode !== null) throw error;
        await sleep(systemClock, 20);
      }
    }
  }

  async kill(): Promise<void> {
    const service = this.#service;
    this.#service = null;
    if (service === null || service.exitCode !== null || service.signalCode !== null) return;
    const gone = once(service, 'exit');
    service.kill('SIGKILL');
    await gone;
  }

  async containers(): Promise<string[]> {
    await using engine = new ContainerEngine({ host: this.host });
    return (await engine.listContainers({})).flatMap(({ names }) => names);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.podman('rm', '--all', '--force', '--time', '0').catch(() => undefined);
    await this.kill();
    await rm(this.#dir, { recursive: true, force: true, maxRetries: 5 });
  }

  async #prepare(): Promise<void> {
    const root = join(this.#dir, 'image');
    await mkdir(join(root, 'bin'), { recursive: true });
    await Promise.all(['tmp', 'etc', 'proc', 'dev', 'sys'].map((name) => mkdir(join(root, name))));
    await copyFile(
      BUSYBOX.find((file) => existsSync(file))!,
      join(root, 'bin/busybox'),
    );
    await Promise.all(APPLETS.split(' ').map((name) => symlink('busybox', join(root, 'bin', name))));
    // Without these the start fails where the test itself may not raise its limits.
    await writeFile(
      join(this.#dir, 'containers.conf'),
      '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n[engine]\nlock_type = "file"\n',
    );
    const archive = join(this.#dir, 'image.tar');
    await run('tar', ['-C', root, '-cf', archive, '.']);
    await this.podman('import', '--quiet', archive, this.image);
    this.pinnedImage = await this.podman(
      'image',
      'inspect',
      '--format',
      '{{index .RepoDigests 0}}',
      this.image,
    );
  }

  #flags(): string[] {
    const dir = (name: string): string => join(this.#dir, name);
    return [
      `--root=${dir('storage')}`,
      `--runroot=${dir('run')}`,
      `--tmpdir=${dir('tmp')}`,
      '--storage-driver=vfs',
      '--cgroup-manager=cgroupfs',
      '--events-backend=none',
      '--runtime=runc',
    ];
  }

  #env(): NodeJS.ProcessEnv {
    return {
      PATH: process.env['PATH'],
      HOME: this.#dir,
      CONTAINERS_CONF: join(this.#dir, 'containers.conf'),
    };
  }
}
