/**
 * The processes that came from one spawned program, and how they are ended.
 *
 * Children are followed from parent to child, and whoever was seen once is remembered. A process that leaves its session and loses its
 * parent is adopted by one of the node's ancestors; there it is recognised by a variable of its environment that only
 * this program was started with. What does both before it was ever seen, and wipes its environment, is not
 * found: only a pid namespace or a cgroup holds that.
 */
import { MillraceError, sleep, type Clock } from '@millrace/runner';
import {
  adoptedBy,
  ancestry,
  childrenOf,
  isDead,
  readLiving,
  readStat,
  wasStartedWith,
  type ProcessId,
  type ProcessStat,
} from './proc.ts';

export interface TreeMember extends ProcessStat {
  /** Steps from the spawned process, which has 0. Adopted ones have the depth they were last seen at, else 1. */
  readonly depth: number;
}

export interface ProcessTreeOptions {
  readonly pid: number;
  /** `NAME=value`, in the environment of the program and of nothing else. Null: nothing can leave, in a pid namespace. */
  readonly marker: string | null;
  readonly clock: Clock;
}

/** Past this the kernel does not let go of a process, such as one in an uninterruptible read. */
const KILL_LIMIT_MS = 10_000;
const KILL_POLL_MS = 5;

export class ProcessTree {
  readonly root: ProcessId | null;
  readonly #marker: string | null;
  readonly #clock: Clock;
  /** By pid. */
  readonly #known = new Map<number, { readonly id: ProcessId; readonly depth: number }>();

  constructor({ pid, marker, clock }: ProcessTreeOptions) {
    this.#marker = marker;
    this.#clock = clock;
    const stat = readStat(pid);
    this.root = stat;
    if (stat !== null) this.#known.set(pid, { id: stat, depth: 0 });
  }

  /** Those that live, as far as they are known or reached from known ones. */
  members(): TreeMember[] {
    const found = new Map<number, TreeMember>();
    const visit = (stat: ProcessStat, depth: number): void => {
      const before = found.get(stat.pid);
      if (before !== undefined && before.depth <= depth) return;
      found.set(stat.pid, { ...stat, depth });
      if (before !== undefined) return;
      for (const pid of childrenOf(stat.pid)) {
        const child = readStat(pid);
        if (child !== null) visit(child, depth + 1);
      }
    };
    // In the order they were first seen, so that a parent comes before its children.
    for (const { id, depth } of this.#known.values()) {
      const stat = readLiving(id);
      if (stat === null) this.#known.delete(id.pid);
      else visit(stat, depth);
    }
    for (const member of found.values()) {
      if (!this.#known.has(member.pid)) this.#known.set(member.pid, { id: member, depth: member.depth });
    }
    return [...found.values()].filter((member) => !isDead(member));
  }

  /** {@link members}, and those that were adopted by an ancestor of this process. */
  membersAndOrphans(): TreeMember[] {
    // Before the adopted: who loses its parent after this look was seen by it, who lost it before is among those.
    const members = this.members();
    if (this.#marker === null) return members;
    const chain = ancestry();
    let adopted = false;
    // Adopted by this process: only if it is the first of its pid namespace, as in a container.
    for (const adopter of process.pid === 1 ? chain : chain.slice(1)) {
      for (const pid of adoptedBy(adopter)) {
        if (this.#known.has(pid) || chain.includes(pid)) continue;
        const stat = readStat(pid);
        if (stat === null || isDead(stat) || this.#isOlder(stat)) continue;
        if (!wasStartedWith(pid, this.#marker)) continue;
        this.#known.set(pid, { id: stat, depth: 1 });
        adopted = true;
      }
    }
    return adopted ? this.members() : members;
  }

  /** Asks those at least `minDepth` deep to end. */
  terminate(minDepth: number): void {
    for (const member of this.membersAndOrphans()) {
      if (member.depth >= minDepth) send(member, 'SIGTERM');
    }
  }

  /**
   * Ends all of them and resolves when none is left. Stops them first, so that none can start another while the next is being killed.
   *
   * @throws MillraceError `internal` naming those that do not die within 10 s.
   */
  async kill(): Promise<void> {
    const deadline = this.#clock.monotonic() + KILL_LIMIT_MS;
    for (;;) {
      // Those of its group that were never seen and cannot be recognised.
      this.#killGroup();
      let members = this.membersAndOrphans();
      if (members.length === 0) return;
      for (let before = 0; members.length > before;) {
        before = members.length;
        for (const member of members) send(member, 'SIGSTOP');
        members = this.members();
      }
      for (const member of members) send(member, 'SIGKILL');
      if (this.#clock.monotonic() > deadline) {
        const pids = members.map(({ pid, state }) => `${pid} (state ${state})`).join(', ');
        throw new MillraceError(
          'internal',
          `processes do not die from SIGKILL within ${KILL_LIMIT_MS} ms: ${pids}; the kernel holds them, or they are another user's`,
        );
      }
      await sleep(this.#clock, KILL_POLL_MS);
    }
  }

  #killGroup(): void {
    const { root } = this;
    if (root === null) return;
    // While a group exists its number is given to no new process. Once somebody else has it, the group is theirs.
    const holder = readStat(root.pid);
    if (holder !== null && holder.started !== root.started) return;
    try {
      process.kill(-root.pid, 'SIGKILL');
    } catch {
      // ESRCH: nobody is left, the usual case. EPERM: all that are left are another user's.
    }
  }

  #isOlder(stat: ProcessStat): boolean {
    return this.root !== null && BigInt(stat.started) < BigInt(this.root.started);
  }
}

/** A process that has ended meanwhile, or became another's (set-user-id), is not ours to signal. */
function send(id: ProcessId, signal: NodeJS.Signals): void {
  // Between this look and the signal the pid could only be used again after all other pids were.
  if (readLiving(id) === null) return;
  try {
    process.kill(id.pid, signal);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ESRCH' && code !== 'EPERM') throw error;
  }
}
