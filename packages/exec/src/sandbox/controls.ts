/**
 * What can be kept from a program, and by which tier of sandbox. The tiers build on each other: each has what the one before has.
 */

export const SANDBOX_TIERS = ['none', 'limits', 'namespaces', 'bwrap'] as const;

/**
 * - `none` a clean environment, an own process group, limits by watching
 * - `limits` and the kernel's own limits per process, no way to gain privileges
 * - `namespaces` and own processes that all die together, also when the node is killed; no network; no capabilities
 * - `bwrap` and a read-only view of the file system's programs, nothing else of it but the task's folder
 */
export type SandboxTier = (typeof SANDBOX_TIERS)[number];

/**
 * - `wall` time from start to end
 * - `memory` resident memory of all its processes
 * - `cpu` CPU time of all its processes
 * - `processes` how many there may be
 * - `open_files` descriptors per process
 * - `disk` bytes in its folder
 * - `kill` nothing of it lives on after a kill, nor after the node's own
 * - `privileges` it can gain none, and has no capabilities
 * - `network` it has none
 * - `filesystem` it sees no more than programs and its own folder
 */
export const SANDBOX_CONTROLS = [
  'wall',
  'memory',
  'cpu',
  'processes',
  'open_files',
  'disk',
  'kill',
  'privileges',
  'network',
  'filesystem',
] as const;

export type SandboxControl = (typeof SANDBOX_CONTROLS)[number];

/** Which controls hold, each with the mechanism that makes it, such as `memory: "cgroup"`. */
export type AppliedControls = Readonly<Partial<Record<SandboxControl, string>>>;

export interface TierReport {
  readonly tier: SandboxTier;
  readonly available: boolean;
  /** Why not, with what to do. Null when it is. */
  readonly reason: string | null;
  /** What was seen to hold when it was tried. Empty when it is not available. */
  readonly controls: AppliedControls;
}

export interface CgroupReport {
  readonly available: boolean;
  readonly reason: string | null;
  /** 1 is the older kind, with a hierarchy per controller. Null when there is none. */
  readonly version: 1 | 2 | null;
  readonly controls: AppliedControls;
}

/** What this machine lets the node's user do. See `probeSandbox`. */
export interface SandboxReport {
  readonly tiers: readonly TierReport[];
  readonly cgroup: CgroupReport;
  /** The highest tier that is available: what `auto` means. */
  readonly best: SandboxTier;
  /** Weaknesses that no tier cures, with what to do. */
  readonly warnings: readonly string[];
}

/** What the kernel or a watch holds a program to. All in whole numbers. */
export interface ResourceLimits {
  readonly memoryBytes: number;
  readonly cpuMs: number;
  readonly processes: number;
  readonly openFiles: number;
  readonly diskBytes: number;
}
