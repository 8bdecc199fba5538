/** From a program and its arguments to the command line that starts it inside of a tier. */
import { lstatSync, readlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import type { ResourceLimits, SandboxTier } from './controls.ts';
import { joinScript, type TaskCgroup } from './cgroup.ts';
import { prelude } from './prelude.ts';

/** The folders of a task, outside of the sandbox. Read-only where the tier can: `inputs`. */
export interface LaunchFolders {
  readonly root: string;
  readonly inputs: string;
  readonly outputs: string;
  readonly work: string;
  readonly temp: string;
}

/** Where the folders are inside of a `bwrap` sandbox; elsewhere they are where they are. */
const INSIDE_ROOT = '/task';

/** The task's folders as the program sees them. */
export function foldersInside(tier: SandboxTier, folders: LaunchFolders): LaunchFolders {
  if (tier !== 'bwrap') return folders;
  const inside = (name: string): string => `${INSIDE_ROOT}/${name}`;
  return {
    root: INSIDE_ROOT,
    inputs: inside('in'),
    outputs: inside('out'),
    work: inside('work'),
    temp: '/tmp',
  };
}

/** The tools the tiers are made of, by their absolute paths: a task's own PATH has no say in which are used. */
export interface LaunchTools {
  /** Null: the tier `limits` does without it, and then neither forbids new privileges nor ends the program with the node. */
  readonly setpriv: string | null;
  readonly unshare: string | null;
  readonly bwrap: string | null;
  /** `bwrap` can forbid further user namespaces. */
  readonly disableUserns: boolean;
}

export interface LaunchOptions {
  readonly tier: SandboxTier;
  readonly tools: LaunchTools;
  /** Absolute path of the program inside of the sandbox, and its arguments. */
  readonly command: readonly [program: string, ...args: string[]];
  readonly folders: LaunchFolders;
  /** Where it starts, inside of the sandbox. */
  readonly cwd: string;
  readonly limits: ResourceLimits;
  /** Threads of the node's user, which count in tier `limits`; 0 in the others. */
  readonly otherProcesses: number;
  readonly network: boolean;
  /** Further files and folders a `bwrap` sandbox shows, at the same place. */
  readonly readable: readonly string[];
  /** Device files it may use, such as `/dev/dri`. */
  readonly devices: readonly string[];
  readonly cgroup: TaskCgroup | null;
}

export interface Launch {
  readonly argv: readonly [program: string, ...args: string[]];
  /** Where the outermost command starts. */
  readonly cwd: string;
  /** Says that the sandbox is in place before the program starts, see `ANNOUNCEMENT`. */
  readonly announces: boolean;
  /** How many of its processes are the sandbox's own; the program is that deep in the tree. */
  readonly wrappers: number;
  /** An exit code above 128 stands for a signal, as in a shell: the sandbox cannot end as its program did. */
  readonly signalsAsCodes: boolean;
}

/** How many processes of the sandbox's own a tier adds, beside the program. */
export function wrappersOf(tier: SandboxTier): number {
  return tier === 'namespaces' || tier === 'bwrap' ? 2 : 0;
}

export function launch(options: LaunchOptions): Launch {
  const { tier, cgroup } = options;
  const inner = tierCommand(options);
  const argv = (cgroup === null ? inner : [...joinScript(cgroup), ...inner]) as [string, ...string[]];
  const wrappers = wrappersOf(tier);
  return {
    argv,
    cwd: tier === 'bwrap' ? '/' : options.cwd,
    announces: tier !== 'none',
    wrappers,
    signalsAsCodes: wrappers > 0,
  };
}

/** The words of a command line that belong together. */
function words(...list: string[]): string[] {
  return list;
}

function tierCommand(options: LaunchOptions): readonly string[] {
  const { tier, command, limits, otherProcesses, tools } = options;
  const confined = (init: boolean, others: number | null): string[] => [
    ...words('/bin/sh', '-c', prelude({ limits, otherProcesses: others, init }), 'sh'),
    ...command,
  ];
  const setpriv = tools.setpriv ?? 'setpriv';
  const byTier: Readonly<Record<SandboxTier, () => readonly string[]>> = {
    none: () => command,
    limits: () => [
      ...(tools.setpriv === null ? [] : words(setpriv, '--pdeathsig', 'KILL', '--no-new-privs')),
      ...confined(false, otherProcesses),
    ],
    namespaces: () => [
      // Only setpriv and unshare together end everything when the node is killed: unshare for its children, setpriv for unshare.
      ...words(setpriv, '--pdeathsig', 'KILL', tools.unshare ?? 'unshare', '--user', '--map-current-user'),
      ...words('--pid', '--fork', '--mount-proc', '--kill-child=SIGKILL', '--ipc', '--uts'),
      ...(options.network ? [] : words('--net')),
      // A program that is root in its namespace would get all capabilities there.
      ...words('--', setpriv, '--no-new-privs', '--bounding-set=-all', '--inh-caps=-all'),
      // As the first process of a pid namespace a program would not die from signals it does not handle.
      ...confined(true, null),
    ],
    bwrap: () => [...bwrapCommand(options), '--', ...confined(false, null)],
  };
  return byTier[tier]();
}

/** What programs need of /etc: libraries, names, certificates, fonts and the choice between alternatives. Nothing secret. */
const ETC = [
  'alternatives',
  'ca-certificates',
  'crypto-policies',
  'fonts',
  'group',
  'ImageMagick-6',
  'ImageMagick-7',
  'ld.so.cache',
  'ld.so.conf',
  'ld.so.conf.d',
  'localtime',
  'magic',
  'mime.types',
  'nsswitch.conf',
  'passwd',
  'pki',
  'ssl/certs',
  'ssl/openssl.cnf',
].map((name) => `/etc/${name}`);
const ETC_FOR_NETWORK = ['/etc/hosts', '/etc/resolv.conf', '/etc/services'];
const SYSTEM = ['/bin', '/sbin', '/lib', '/lib64', '/lib32', '/libx32'];
/** For a user without name: the kernel's "nobody". */
const NOBODY = '65534';

function bwrapCommand({ folders, cwd, limits, network, readable, devices, tools }: LaunchOptions): string[] {
  const show = (path: string): string[] => ['--ro-bind-try', path, path];
  const inside = foldersInside('bwrap', folders);
  return [
    tools.bwrap ?? 'bwrap',
    ...words('--unshare-user', '--unshare-ipc', '--unshare-pid', '--unshare-uts', '--unshare-cgroup-try'),
    ...(network ? [] : ['--unshare-net']),
    ...(tools.disableUserns ? ['--disable-userns'] : []),
    '--die-with-parent',
    ...words('--cap-drop', 'ALL'),
    // Otherwise it would see itself as root, and some programs then try what only root may.
    ...(process.getuid?.() === 0 ? ['--uid', NOBODY, '--gid', NOBODY] : []),
    ...words('--ro-bind', '/usr', '/usr'),
    ...SYSTEM.flatMap(systemFolder),
    ...show('/opt'),
    ...ETC.flatMap(show),
    ...(network ? ETC_FOR_NETWORK.flatMap(show) : []),
    ...words('--proc', '/proc', '--dev', '/dev'),
    ...devices.flatMap((path) => ['--dev-bind', path, path]),
    // What is kept there is memory that belongs to no process.
    ...words('--size', String(limits.memoryBytes), '--tmpfs', '/dev/shm'),
    // Before what is readable, which may be below it.
    ...words('--bind', folders.temp, inside.temp),
    ...readable.flatMap((path) => ['--ro-bind', path, path]),
    ...words('--ro-bind', folders.inputs, inside.inputs),
    ...words('--bind', folders.outputs, inside.outputs),
    ...words('--bind', folders.work, inside.work),
    ...words('--remount-ro', '/', '--remount-ro', '/dev'),
    ...words('--chdir', cwd),
  ];
}

/** On most systems these are links into /usr. */
function systemFolder(path: string): string[] {
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (found === undefined) return [];
  return found.isSymbolicLink() ? ['--symlink', readlinkSync(path), path] : ['--ro-bind', path, path];
}

/** Whether a program at this path is seen inside of a `bwrap` sandbox. */
export function isVisible(path: string, readable: readonly string[]): boolean {
  return ['/usr', '/opt', ...SYSTEM, ...readable].some(
    (folder) => path === folder || path.startsWith(folder.endsWith('/') ? folder : `${folder}/`),
  );
}

/** Where tasks' folders are made unless the operator says otherwise: per user, so that nobody else can have made it. */
export function defaultWorkDir(): string {
  return `${tmpdir()}/millrace-exec-${process.getuid?.() ?? 0}`;
}
