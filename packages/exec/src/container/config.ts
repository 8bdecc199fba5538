/** From a plan to what the engine is asked to create: everything closed but what the plan opens. */
import type { ContainerConfig } from './engine.ts';
import type { ContainerLimits } from './limits.ts';

/** Where things are in the container. The same places as in a subprocess's sandbox. */
export const INSIDE = { inputs: '/task/in', outputs: '/task/out', events: '/task/events' } as const;

/** Of a folder that an image declares as a volume. A volume would be a folder on the machine's disk, without a limit. */
export const DEFAULT_TMPFS_BYTES = 64 * 1024 * 1024;

export interface ConfigParts {
  /** The image's id, so that it is the very image that was looked at. */
  readonly imageId: string;
  readonly volumes: readonly string[];
  /** Null: the image's own. */
  readonly command: readonly string[] | null;
  readonly args: readonly string[] | null;
  readonly env: Readonly<Record<string, string>>;
  readonly labels: Readonly<Record<string, string>>;
  readonly user: string;
  readonly workdir: string | null;
  readonly stopSignal: string;
  readonly network: boolean;
  readonly readOnlyRoot: boolean;
  /** Sizes in bytes by folder. */
  readonly tmpfs: ReadonlyMap<string, number>;
  readonly limits: ContainerLimits;
  /** On the engine's machine. */
  readonly folders: { readonly inputs: string; readonly outputs: string; readonly events: string };
}

export function containerConfig(parts: ConfigParts): ContainerConfig {
  const { limits, folders } = parts;
  const memory = limits.memoryMiB * 1024 ** 2;
  const ulimit = (Name: string, limit: number): object => ({ Name, Soft: limit, Hard: limit });
  // `z` lets containers read it where SELinux says who may, and means nothing elsewhere; the API's newer mounts cannot ask for that.
  const bind = (source: string, target: string, mode: 'ro' | 'rw'): string => `${source}:${target}:${mode},z`;
  const tmpfs = new Map([
    ...parts.volumes.map((path) => [path, DEFAULT_TMPFS_BYTES] as const),
    ...parts.tmpfs,
  ]);
  return {
    Image: parts.imageId,
    ...(parts.command === null ? {} : { Entrypoint: parts.command }),
    ...(parts.args === null ? {} : { Cmd: parts.args }),
    Env: Object.entries(parts.env).map(([name, value]) => `${name}=${value}`),
    User: parts.user,
    ...(parts.workdir === null ? {} : { WorkingDir: parts.workdir }),
    Labels: parts.labels,
    StopSignal: parts.stopSignal,
    NetworkDisabled: !parts.network,
    HostConfig: {
      NetworkMode: parts.network ? 'default' : 'none',
      ReadonlyRootfs: parts.readOnlyRoot,
      Privileged: false,
      CapDrop: ['ALL'],
      SecurityOpt: ['no-new-privileges'],
      IpcMode: 'private',
      Memory: memory,
      // The sum of memory and swap: no swap.
      MemorySwap: memory,
      NanoCpus: Math.round(limits.cpus * 1e9),
      PidsLimit: limits.pids,
      Ulimits: [
        ulimit('nofile', limits.nofile),
        ulimit('fsize', limits.diskBytes),
        ulimit('core', 0),
        ...(limits.nproc > 0 ? [ulimit('nproc', limits.nproc)] : []),
      ],
      // Output goes to whoever is attached. The engine's own log would grow on its disk without a limit.
      LogConfig: { Type: 'none', Config: {} },
      RestartPolicy: { Name: 'no' },
      AutoRemove: false,
      Binds: [
        bind(folders.inputs, INSIDE.inputs, 'ro'),
        bind(folders.outputs, INSIDE.outputs, 'rw'),
        bind(folders.events, INSIDE.events, 'rw'),
      ],
      Mounts: [...tmpfs].map(([Target, SizeBytes]) => ({
        Type: 'tmpfs',
        Target,
        TmpfsOptions: { SizeBytes, Mode: 0o1777 },
      })),
    },
    // What an image has run to watch itself would run beside the program, and count against its limits.
    Healthcheck: { Test: ['NONE'] },
  };
}
