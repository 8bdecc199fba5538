/**
 * The WASI runtime: a Golem runtime in server mode that runs the programs of an image in the sandbox of `@millrace/compute`.
 * The image is `--task-package`; its mount points, `/in` (read-only) and `/out` where it names none, are the volumes. Each
 * command is one program, from nothing, in a thread of its own.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { WasiCommands, WasiMount } from '@millrace/compute';
import { describeError } from '@millrace/runner';
import {
  RuntimeError,
  defineRuntime,
  runRuntime,
  type CommandContext,
  type ParsedCli,
  type RunCommand,
  type Volume,
} from '@millrace/runtime';
import type { WasiImage } from './image.ts';
import { programVersion } from '../version.ts';

interface Config {
  /** Memory of a program, MiB. The agreement's, where it says one, if that is less. */
  readonly maxMemoryMb: number;
  /** Time of a program. */
  readonly maxWallMs: number;
  /** Checking and compiling a module. */
  readonly maxPrepareMs: number;
  readonly maxImageBytes: number;
  readonly maxModuleBytes: number;
  /** Both streams of a program. */
  readonly maxOutputBytes: number;
  /** The writable volumes together, as a program finds and leaves them. The agreement's, where it says one, if that is less. */
  readonly maxStorageBytes: number;
  readonly maxFiles: number;
  /** Variables of the programs. */
  readonly env: Readonly<Record<string, string>>;
}

const DEFAULTS: Config = {
  maxMemoryMb: 512,
  maxWallMs: 24 * 60 * 60_000,
  maxPrepareMs: 30_000,
  maxImageBytes: 256 * 1024 * 1024,
  maxModuleBytes: 64 * 1024 * 1024,
  maxOutputBytes: 64 * 1024 * 1024,
  maxStorageBytes: 16 * 1024 ** 3,
  maxFiles: 100_000,
  env: {},
};

/** What `deploy` leaves for `start`, which is another process. */
interface Deployment {
  readonly image: string;
  readonly vols: readonly (Volume & { readonly writable: boolean })[];
}

const DEPLOYMENT = 'deployment.json';
const GIB = 1024 ** 3;

type Program = Awaited<ReturnType<WasiImage['module']>>;

/** An open deployment. */
interface Deployed {
  readonly image: WasiImage;
  /** By entry point, as far as they were run: reading one again would unpack it again. */
  readonly programs: Map<string, Promise<Program>>;
  readonly mounts: readonly WasiMount[];
  readonly commands: WasiCommands;
}

let deployed: Deployed | null = null;
/** Seconds that programs ran, all together: what a provider may charge for. */
let guestSeconds = 0;

interface Place {
  readonly cli: ParsedCli;
  readonly config: Config;
}

async function deploy({ cli, config }: Place): Promise<{ readonly vols: readonly Volume[] }> {
  if (cli.taskPackage === null) {
    throw new RuntimeError(
      'there is no image; give one with --task-package: a .wasm, a zip archive, or a folder',
    );
  }
  const file = path.resolve(cli.taskPackage);
  const { openImage, mountPath } = await import('./image.ts');
  const image = await openImage(file, config);
  await using commands = await openCommands(cli, config);
  // All that can be said against an image is said here, not in the middle of a script.
  for (const entryPoint of image.entryPoints ?? ['main']) {
    const program = await image.module(entryPoint);
    try {
      commands.check(program!.bytes);
    } catch (error) {
      throw new RuntimeError(`entry point ${entryPoint}: ${describeError(error)}`, { cause: error });
    }
  }
  const mounts = new Map(image.mounts.map(({ path: inside, writable }) => [inside, writable]));
  for (const [inside, kind] of Object.entries(cli.volumeOverride ?? {})) {
    if (!('host' in kind)) {
      throw new RuntimeError(
        `volume ${inside}: only folders are offered ({"host":{}}), not ${Object.keys(kind).join(', ')}`,
      );
    }
    const normal = mountPath(inside);
    if (!mounts.has(normal)) mounts.set(normal, true);
  }
  const vols = [...mounts].map(([inside, writable], index) => ({
    name: `vol-${index}`,
    path: inside,
    writable,
  }));
  const deployment: Deployment = { image: file, vols };
  await mkdir(cli.workdir!, { recursive: true });
  await writeFile(path.join(cli.workdir!, DEPLOYMENT), JSON.stringify(deployment));
  return { vols: vols.map(({ name, path: inside }) => ({ name, path: inside })) };
}

async function open({ cli, config }: Place): Promise<Deployed> {
  const workdir = path.resolve(cli.workdir!);
  const text = await readFile(path.join(workdir, DEPLOYMENT), 'utf8').catch((error: unknown) => {
    throw new RuntimeError(`nothing is deployed in ${workdir}; deploy first`, { cause: error });
  });
  const { image, vols } = JSON.parse(text) as Deployment;
  const { openImage } = await import('./image.ts');
  return {
    image: await openImage(image, config),
    programs: new Map(),
    mounts: vols.map(({ name, path: guestPath, writable }) => ({
      guestPath,
      hostPath: path.join(workdir, name),
      writable,
    })),
    commands: await openCommands(cli, config),
  };
}

async function openCommands(cli: ParsedCli, config: Config): Promise<WasiCommands> {
  const { WasiCommands } = await import('@millrace/compute');
  const { maxImageBytes: _image, env: _env, maxMemoryMb, maxStorageBytes, ...limits } = config;
  const memory = cli.memGib === null ? maxMemoryMb : Math.min(maxMemoryMb, Math.floor(cli.memGib * 1024));
  const storage =
    cli.storageGib === null ? maxStorageBytes : Math.min(maxStorageBytes, Math.floor(cli.storageGib * GIB));
  return new WasiCommands(
    { ...limits, maxMemoryMb: Math.max(1, memory), maxStorageBytes: storage },
    cli.cpuCores === null ? {} : { workers: Math.max(1, Math.trunc(cli.cpuCores)) },
  );
}

async function runProgram(
  command: CommandContext,
  { entryPoint, args }: RunCommand,
  place: Place,
): Promise<void> {
  deployed ??= await open(place);
  const { image, mounts, commands } = deployed;
  const program = await programOf(deployed, entryPoint);
  if (program === null) {
    throw new RuntimeError(
      `${entryPoint} is no entry point of image ${image.name}; there are ${image.entryPoints?.join(', ')}`,
      {
        exitCode: 127,
      },
    );
  }
  let writing: Promise<void> = Promise.resolve();
  const { exitCode, trap, wallMs } = await commands.run(program.bytes, {
    args: [program.calledAs, ...args],
    env: place.config.env,
    mounts,
    signal: command.signal,
    onOutput: (stream, bytes) => {
      writing = command[stream](bytes);
    },
  });
  await writing;
  guestSeconds += wallMs / 1000;
  await command.counter('millrace.wasi.guest_sec', guestSeconds);
  if (trap !== null) await command.stderr(`${[`trapped: ${trap.message}`, ...trap.trace].join('\n  ')}\n`);
  // Its own code has 32 bits without a sign, the protocol's have one.
  command.exitCode = exitCode | 0;
}

async function programOf({ image, programs }: Deployed, entryPoint: string): Promise<Program> {
  // A module by itself answers to every name, so names are no bound for what is kept.
  if (image.entryPoints === null) return await image.module(entryPoint);
  const reading = programs.get(entryPoint) ?? image.module(entryPoint);
  programs.set(entryPoint, reading);
  return await reading;
}

/** Whether threads start and the compiler works. */
async function selfTest({ cli, config }: Place): Promise<void> {
  await using commands = await openCommands(cli, config);
  const { exitCode } = await commands.run(NOTHING_TO_DO);
  if (exitCode !== 0) throw new RuntimeError(`a program that does nothing ended with ${exitCode}`);
}

/** `(module (func (export "_start")))` */
const NOTHING_TO_DO = Buffer.from('AGFzbQEAAAABBAFgAAADAgEABwoBBl9zdGFydAAACgQBAgAL', 'base64');

await runRuntime(
  defineRuntime({
    name: 'wasi',
    version: programVersion(),
    description: 'Runs the WASI programs of an image in a sandbox.',
    config: { defaults: DEFAULTS },
    deploy,
    async start(ctx) {
      deployed = await open(ctx);
    },
    runCommand(ctx, run) {
      const entryPoints = deployed?.image.entryPoints ?? null;
      // Refused before it is a command, where that is known.
      if (entryPoints !== null && !entryPoints.includes(run.entryPoint)) {
        throw new RuntimeError(`${run.entryPoint} is no entry point; there are ${entryPoints.join(', ')}`, {
          kind: 'not_found',
        });
      }
      return ctx.command((command) => runProgram(command, run, ctx));
    },
    async stop() {
      await deployed?.commands.close();
    },
    test: selfTest,
    offer: () => ({ properties: { 'golem.runtime.wasi.versions': ['preview1'] } }),
  }),
);
