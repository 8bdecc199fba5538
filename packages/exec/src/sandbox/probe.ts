/**
 * Finds out what the machine lets the node's user do, by doing it: each tier is started exactly as a task would be, around a few lines of
 * shell that look at what holds inside. A tool that is installed may still be refused by the kernel, and one that ends well may
 * have done nothing.
 */
import { mkdtemp, mkdir, rm, writeFile } from 'node:fs/promises';
import { readlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { randomUUID } from 'node:crypto';
import { describeError, systemClock, type Clock } from '@millrace/runner';
import { startChild } from '../process/child.ts';
import { SAFE_PATH, findProgram } from '../process/find-program.ts';
import { countUserThreads } from '../process/proc.ts';
import { ProcessTree } from '../process/process-tree.ts';
import { TaskCgroup, cgroupReport, findCgroupParent, joinScript, type CgroupParent } from './cgroup.ts';
import {
  SANDBOX_TIERS,
  type AppliedControls,
  type CgroupReport,
  type ResourceLimits,
  type SandboxReport,
  type SandboxTier,
  type TierReport,
} from './controls.ts';
import { launch, type LaunchFolders, type LaunchTools } from './launch.ts';

export interface ProbeOptions {
  /** Folder of the control group (version 2) below which tasks get theirs. Default: the node's own group, or the one above. */
  readonly cgroupParent?: string;
  readonly clock?: Clock;
}

/** What a runner needs of the probe beside the report. */
export interface SandboxFindings {
  readonly report: SandboxReport;
  readonly tools: LaunchTools;
  readonly cgroupParent: CgroupParent | null;
}

/**
 * Tries all tiers and control groups, in about a second, once per process: subprocess runners share the findings. For
 * `millrace doctor`, and for a node that says at its start what it has. What cannot be had is in the report, with the reason;
 * it rejects only when no temporary folder can be made.
 */
export async function probeSandbox(options: ProbeOptions = {}): Promise<SandboxReport> {
  return (await sandboxFindings(options)).report;
}

const findings = new Map<string, Promise<SandboxFindings>>();

/** The findings of this process: made when first asked for. */
export function sandboxFindings(options: ProbeOptions): Promise<SandboxFindings> {
  const key = options.cgroupParent ?? '';
  let found = findings.get(key);
  if (found === undefined) {
    found = examineSandbox(options);
    findings.set(key, found);
    // Not for ever, such as when the temporary folder was full.
    found.catch(() => findings.delete(key));
  }
  return found;
}

const PROBE_LIMIT_MS = 20_000;
const PROBE_LIMITS: ResourceLimits = {
  memoryBytes: 256 * 1024 ** 2,
  cpuMs: 10_000,
  processes: 16,
  openFiles: 64,
  diskBytes: 1024 ** 2,
};

/** Facts as `name=value` lines. Forking until it is refused comes last, since the shell ends there. */
const LOOK = `
echo open_files=$(ulimit -n)
(ulimit -n 65 2>/dev/null && echo raised=yes)
echo file_blocks=$(ulimit -f)
echo processes=$(ulimit -u 2>/dev/null || ulimit -p)
while read -r name value; do case $name in NoNewPrivs:|CapEff:|CapBnd:) echo "$name=$value";; esac; done </proc/self/status
while read -r name rest; do case $name in *:*) echo "interface=$name";; esac; done </proc/net/dev
echo pids=$(readlink /proc/self/ns/pid)
[ -r "$1" ] && echo sees_outside=yes
(: >/usr/.millrace-probe) 2>/dev/null && echo writes_outside=yes
: >"$TMPDIR/probe" && echo writes_inside=yes
for fd in /proc/$$/fd/*; do [ -e "$fd" ] && echo "descriptor=\${fd##*/}"; done
[ "$2" = forks ] || exit 0
i=0; while [ $i -lt 24 ]; do sleep 3 2>/dev/null & i=$((i+1)); done
echo forks=unlimited
`;

interface Facts {
  readonly values: ReadonlyMap<string, readonly string[]>;
  readonly problem: string | null;
}

async function examineSandbox({
  cgroupParent: given,
  clock = systemClock,
}: ProbeOptions): Promise<SandboxFindings> {
  if (process.platform !== 'linux') return notLinux();
  const root = await mkdtemp(join(tmpdir(), 'millrace-probe-'));
  try {
    const folders = await makeFolders(root);
    const [setpriv, unshare, bwrapTool] = await Promise.all(['setpriv', 'unshare', 'bwrap'].map(findTool));
    const canSetpriv =
      setpriv != null &&
      (await run([setpriv, '--no-new-privs', '/bin/true'], folders, clock)).problem === null;
    const plain: LaunchTools = {
      setpriv: canSetpriv ? setpriv : null,
      unshare: unshare ?? null,
      bwrap: bwrapTool ?? null,
      disableUserns: false,
    };
    const look = (tier: SandboxTier, tools: LaunchTools): Promise<Facts> =>
      lookInside(tier, tools, folders, clock);
    const [none, limits, namespaces, bwrap, hardBwrap] = await Promise.all([
      look('none', plain),
      look('limits', plain),
      look('namespaces', plain),
      look('bwrap', plain),
      look('bwrap', { ...plain, disableUserns: true }),
    ]);
    const disableUserns = hardBwrap.problem === null;
    const tiers = [
      tierReport('none', none),
      tierReport('limits', limits),
      tierReport('namespaces', namespaces),
      tierReport('bwrap', disableUserns ? hardBwrap : bwrap),
    ];
    const { cgroup, parent } = await examineCgroup(given, folders, clock);
    return {
      report: {
        tiers,
        cgroup,
        best:
          SANDBOX_TIERS.findLast((tier) => tiers.find((entry) => entry.tier === tier)?.available) ?? 'none',
        warnings: warnings(none),
      },
      tools: { ...plain, disableUserns },
      cgroupParent: parent,
    };
  } finally {
    await rm(root, { recursive: true, force: true });
  }
}

/** Null when it is not installed. */
async function findTool(name: string): Promise<string | null> {
  return await findProgram(name, `${process.env['PATH'] ?? ''}:${SAFE_PATH}:/usr/sbin:/sbin`).catch(
    () => null,
  );
}

async function makeFolders(root: string): Promise<LaunchFolders> {
  const folders: LaunchFolders = {
    root,
    inputs: join(root, 'in'),
    outputs: join(root, 'out'),
    work: join(root, 'work'),
    temp: join(root, 'tmp'),
  };
  for (const path of [folders.inputs, folders.outputs, folders.work, folders.temp]) await mkdir(path);
  await writeFile(join(root, 'outside'), '');
  return folders;
}

async function lookInside(
  tier: SandboxTier,
  tools: LaunchTools,
  folders: LaunchFolders,
  clock: Clock,
): Promise<Facts> {
  const { argv } = launch({
    tier,
    tools,
    // Where processes are counted per user, or not at all, there is no limit to be met.
    command: [
      '/bin/sh',
      '-c',
      LOOK,
      'sh',
      join(folders.root, 'outside'),
      tier === 'namespaces' || tier === 'bwrap' ? 'forks' : '',
    ],
    folders,
    cwd: tier === 'bwrap' ? '/task/work' : folders.work,
    limits: PROBE_LIMITS,
    otherProcesses: tier === 'limits' ? countUserThreads() : 0,
    network: false,
    readable: [],
    devices: [],
    cgroup: null,
  });
  return await run(argv, folders, clock, tier === 'bwrap' ? '/tmp' : folders.temp);
}

/** Runs to the end, then ends what is left of it. */
async function run(
  argv: readonly [string, ...string[]],
  folders: LaunchFolders,
  clock: Clock,
  temp: string = folders.temp,
): Promise<Facts> {
  const marker = `MILLRACE_RUN_ID=${randomUUID()}`;
  const values = new Map<string, string[]>();
  try {
    const child = await startChild({
      argv,
      cwd: folders.work,
      env: {
        PATH: SAFE_PATH,
        TMPDIR: temp,
        MILLRACE_RUN_ID: marker.slice(marker.indexOf('=') + 1),
      },
      stdin: false,
    });
    const tree = new ProcessTree({ pid: child.pid, marker, clock });
    const output = Promise.all([text(child.stdout), text(child.stderr), text(child.events)]);
    const timer = clock.setTimer(() => void tree.kill().catch(() => undefined), PROBE_LIMIT_MS);
    const { code } = await child.exited;
    await tree.kill();
    timer.cancel();
    const [stdout, stderr] = await output;
    for (const line of stdout.split('\n')) {
      const at = line.indexOf('=');
      if (at > 0)
        values.set(line.slice(0, at), [...(values.get(line.slice(0, at)) ?? []), line.slice(at + 1)]);
    }
    // The look ends with an error where forks are refused, as they should be.
    const looked = values.has('pids');
    const failed = !looked && code !== 0;
    return { values, problem: failed ? firstLine(stderr) || `${argv[0]} ended with code ${code}` : null };
  } catch (error) {
    return { values, problem: describeError(error) };
  }
}

function tierReport(tier: SandboxTier, facts: Facts): TierReport {
  const has = (name: string, value: string): boolean => facts.values.get(name)?.includes(value) ?? false;
  const refused = (reason: string): TierReport => ({ tier, available: false, reason, controls: {} });
  if (facts.problem !== null) return refused(`${facts.problem}; ${ADVICE[tier]}`);
  const watched: AppliedControls = { wall: 'timer', memory: 'watched', cpu: 'watched', disk: 'watched' };
  if (tier === 'none') return { tier, available: true, reason: null, controls: watched };

  if (!has('writes_inside', 'yes')) return refused('the program could not write to its own folder');
  const capable = !has('CapEff:', '0000000000000000');
  const controls: Record<string, string> = { ...watched };
  if (has('open_files', String(PROBE_LIMITS.openFiles)) && !facts.values.has('raised')) {
    controls['open_files'] = 'rlimit';
    Object.assign(controls, { memory: 'watched, rlimit', cpu: 'watched, rlimit' });
  }
  if (has('file_blocks', String(PROBE_LIMITS.diskBytes / 512))) controls['disk'] = 'watched, rlimit';
  if (has('NoNewPrivs:', '1') && !capable) controls['privileges'] = 'no new privileges';
  if (tier === 'limits') {
    // The kernel does not hold root to it, nor who may raise limits.
    const held = !capable && /^\d+$/.test(facts.values.get('processes')?.[0] ?? '');
    if (held) controls['processes'] = 'watched, rlimit per user';
  } else if (!facts.values.has('forks')) controls['processes'] = 'rlimit';
  if (tier === 'limits') return { tier, available: true, reason: null, controls };

  const pids = facts.values.get('pids')?.[0];
  if (pids !== undefined && pids !== readlinkSync('/proc/self/ns/pid')) controls['kill'] = 'pid namespace';
  if (facts.values.get('interface')?.every((name) => name.startsWith('lo:')) ?? false) {
    controls['network'] = 'network namespace';
  }
  if (tier === 'bwrap' && !facts.values.has('sees_outside') && !facts.values.has('writes_outside')) {
    controls['filesystem'] = 'mount namespace';
  }
  // These are what the tiers are for; half of one is none.
  const lacks = (
    ['kill', 'network', 'privileges', ...(tier === 'bwrap' ? ['filesystem'] : [])] as const
  ).filter((control) => controls[control] === undefined);
  return lacks.length > 0
    ? refused(`it started, but did not hold: ${lacks.join(', ')}`)
    : { tier, available: true, reason: null, controls };
}

const ADVICE: Readonly<Record<SandboxTier, string>> = {
  none: 'a POSIX shell at /bin/sh is needed',
  limits: 'a POSIX shell at /bin/sh with ulimit is needed',
  namespaces: 'install util-linux 2.38 or newer, and allow unprivileged user namespaces',
  bwrap: 'install bubblewrap 0.4 or newer, and allow unprivileged user namespaces',
};

function warnings(none: Facts): string[] {
  const stray = (none.values.get('descriptor') ?? []).filter((descriptor) => Number(descriptor) > 3);
  return stray.length === 0
    ? []
    : [
        `the node was started with descriptors ${stray.join(', ')} open, and every program it runs inherits them; ` +
          'start it without, or close them in the shell before',
      ];
}

async function examineCgroup(
  given: string | undefined,
  folders: LaunchFolders,
  clock: Clock,
): Promise<{ readonly cgroup: CgroupReport; readonly parent: CgroupParent | null }> {
  const found = findCgroupParent(given);
  if ('reason' in found) return { cgroup: cgroupReport(found), parent: null };
  try {
    const group = TaskCgroup.create(found, 'probe', PROBE_LIMITS);
    try {
      const { problem } = await run([...joinScript(group), '/bin/true'], folders, clock);
      if (problem !== null) throw new Error(`a process could not join its group: ${problem}`);
    } finally {
      await group.kill(clock);
      await group.remove(clock);
    }
    return { cgroup: cgroupReport(found), parent: found };
  } catch (error) {
    return { cgroup: cgroupReport({ reason: describeError(error) }), parent: null };
  }
}

function notLinux(): SandboxFindings {
  const reason = `subprocess runners need Linux, this is ${process.platform}`;
  return {
    report: {
      tiers: SANDBOX_TIERS.map((tier) => ({ tier, available: false, reason, controls: {} })),
      cgroup: cgroupReport({ reason }),
      best: 'none',
      warnings: [],
    },
    tools: { setpriv: null, unshare: null, bwrap: null, disableUserns: false },
    cgroupParent: null,
  };
}

function firstLine(output: string): string {
  return output.trim().split('\n')[0] ?? '';
}
