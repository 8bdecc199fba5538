/** What `millrace doctor` looks at, one check after another. */
import { randomUUID } from 'node:crypto';
import { open, rm, statfs } from 'node:fs/promises';
import path from 'node:path';
import { connect } from '@millrace/dispatch/client';
import type { AppliedControls, SandboxReport } from '@millrace/exec';
import { MillraceError, describeError, systemClock } from '@millrace/runner';
import { loadConfig, type LoadedConfig, type RunnerSpec } from './config-file.ts';
import { findToken, findUrl } from './connection.ts';
import { ensureDataDir, resolveDataDir } from './data-dir.ts';
import type { CommandContext } from './io.ts';
import { formatBytes, formatDuration } from './units.ts';

export interface Check {
  readonly name: string;
  readonly state: 'ok' | 'warn' | 'fail';
  readonly finding: string;
  /** What to do about it; null when there is nothing to do. */
  readonly todo: string | null;
  /** More of it, for programs. */
  readonly details?: unknown;
}

const MIN_NODE = [20, 19] as const;
const GIB = 1024 ** 3;
/** Below this each acknowledged write is slow enough to notice. */
const SLOW_SYNCS_PER_SEC = 200;
const SYNC_MEASURE_MS = 400;
/** Tokens are valid from their time of issue, and leases are timed in seconds. */
const MAX_CLOCK_OFFSET_MS = 5_000;

export async function* examine(
  context: CommandContext,
  configFile: string | undefined,
): AsyncGenerator<Check> {
  yield nodeVersion(process.versions.node);
  yield* dataFolder(resolveDataDir(context));
  yield* sandboxes();
  yield await containerEngine();
  yield* dispatcher(context);
  let config: LoadedConfig;
  try {
    config = await loadConfig(configFile, context.io.cwd);
  } catch (error) {
    yield { name: 'config', state: 'fail', finding: describeError(error), todo: 'mend the config file' };
    return;
  }
  yield {
    name: 'config',
    state: 'ok',
    finding: config.file === null ? 'no millrace.config file here; none is needed' : config.file,
    todo: null,
  };
  for (const spec of config.runners) yield await runnerModule(spec);
}

/** @internal exported for its test */
export function nodeVersion(version: string): Check {
  const [major = 0, minor = 0] = version.split('.').map(Number);
  const fine = major > MIN_NODE[0] || (major === MIN_NODE[0] && minor >= MIN_NODE[1]);
  return {
    name: 'node.js',
    state: fine ? 'ok' : 'fail',
    finding: `version ${version}`,
    todo: fine ? null : `install Node.js ${MIN_NODE.join('.')} or newer`,
  };
}

async function* dataFolder(dir: string): AsyncGenerator<Check> {
  const name = 'data folder';
  const other = 'choose another folder with --data or MILLRACE_DATA, or mend its permissions';
  const probe = path.join(dir, `.doctor-${randomUUID()}`);
  try {
    await ensureDataDir(dir);
    const rate = await syncRate(probe);
    yield { name, state: 'ok', finding: `${dir} is writable`, todo: null };
    yield {
      name: 'disk',
      state: rate < SLOW_SYNCS_PER_SEC ? 'warn' : 'ok',
      finding: `${Math.round(rate)} durable writes per second`,
      todo:
        rate < SLOW_SYNCS_PER_SEC
          ? `every accepted job waits for one; a faster disk for ${dir} makes submitting and completing faster`
          : null,
    };
  } catch (error) {
    yield { name, state: 'fail', finding: describeError(error), todo: other };
    return;
  } finally {
    await rm(probe, { force: true });
  }
  const { bavail, bsize } = await statfs(dir);
  const free = bavail * bsize;
  yield {
    name: 'free space',
    state: free < 0.1 * GIB ? 'fail' : free < GIB ? 'warn' : 'ok',
    finding: `${formatBytes(free)} on the disk of the data folder`,
    todo:
      free < GIB
        ? 'inputs and artifacts are kept there; make room or choose another folder with --data'
        : null,
  };
}

/** How often per second 4 KiB reach the disk for good. */
async function syncRate(file: string): Promise<number> {
  const block = Buffer.alloc(4096);
  await using handle = await open(file, 'wx', 0o600);
  const start = systemClock.monotonic();
  let writes = 0;
  let elapsed = 0;
  do {
    await handle.write(block, 0, block.length, 0);
    await handle.datasync();
    writes += 1;
    elapsed = systemClock.monotonic() - start;
  } while (elapsed < SYNC_MEASURE_MS);
  return (writes * 1000) / elapsed;
}

/** What programs can be kept from here, tier by tier, each tried by running it. */
async function* sandboxes(): AsyncGenerator<Check> {
  const { probeSandbox } = await import('@millrace/exec');
  const name = 'sandbox';
  let report: SandboxReport;
  try {
    report = await probeSandbox();
  } catch (error) {
    yield { name, state: 'warn', finding: describeError(error), todo: 'subprocess runners need it' };
    return;
  }
  const holds = (controls: AppliedControls): string =>
    Object.entries(controls)
      .map(([control, by]) => `${control} (${by})`)
      .join(', ');
  for (const tier of report.tiers) {
    const best = tier.tier === report.best ? ', what auto takes' : '';
    yield tier.available
      ? {
          name,
          state: 'ok',
          finding: `${tier.tier} works${best}: ${holds(tier.controls)}`,
          todo: null,
          details: tier,
        }
      : { name, state: 'warn', finding: `${tier.tier} does not work`, todo: tier.reason, details: tier };
  }
  const { cgroup, warnings } = report;
  yield cgroup.available
    ? {
        name,
        state: 'ok',
        finding: `control groups, version ${cgroup.version}: ${holds(cgroup.controls)}`,
        todo: null,
        details: cgroup,
      }
    : {
        name,
        state: 'warn',
        finding: 'no control group can be made, so memory and processes are watched',
        todo: cgroup.reason,
        details: cgroup,
      };
  for (const warning of warnings) yield { name, state: 'warn', finding: warning, todo: null };
}

async function containerEngine(): Promise<Check> {
  const { probeContainerEngine } = await import('@millrace/exec');
  const report = await probeContainerEngine();
  const name = 'containers';
  if (report.available) {
    const { engine, host, rootless } = report;
    return {
      name,
      state: 'ok',
      finding: `${engine} at ${host}${rootless === true ? ', rootless' : ''}`,
      todo: null,
      details: report,
    };
  }
  return {
    name,
    state: 'warn',
    finding: report.engine === null ? 'no engine answers' : `${report.engine} cannot be used`,
    todo: `only container runners need one: ${report.reason}`,
    details: report,
  };
}

async function* dispatcher(context: CommandContext): AsyncGenerator<Check> {
  const name = 'dispatcher';
  let url: string | null;
  try {
    url = await findUrl(context);
  } catch (error) {
    yield { name, state: 'fail', finding: describeError(error), todo: 'name it with --url' };
    return;
  }
  if (url === null) {
    yield {
      name,
      state: 'warn',
      finding: 'none is running on the data folder',
      todo: '"millrace up" starts one; --url or MILLRACE_URL names one elsewhere',
    };
    return;
  }
  const token = await findToken(context, url);
  const requestor = connect({ url, token: token ?? '', timeoutMs: 5_000 });
  try {
    const { version } = await requestor.health();
    yield { name, state: 'ok', finding: `${url} answers, version ${version}`, todo: null };
    yield await clockOffset(url);
    if (token === null) {
      yield {
        name: 'token',
        state: 'fail',
        finding: `none for ${url}`,
        todo: 'pass --token or MILLRACE_TOKEN; the dispatcher keeps one in client-token in its data folder',
      };
      return;
    }
    yield await requestor.jobs({ limit: 1 }).then(
      (): Check => ({ name: 'token', state: 'ok', finding: 'accepted', todo: null }),
      (error: unknown): Check => ({
        name: 'token',
        state: 'fail',
        finding: describeError(error),
        todo: 'pass the right one with --token or MILLRACE_TOKEN',
      }),
    );
  } catch (error) {
    yield {
      name,
      state: 'fail',
      finding: `${url}: ${describeError(error)}`,
      todo: 'start it ("millrace up", "millrace dispatch serve"), or name another with --url',
    };
  } finally {
    await requestor.close();
  }
}

/** By the `Date` of an answer, which counts whole seconds; so up to one second is no finding. */
async function clockOffset(url: string): Promise<Check> {
  const name = 'clock';
  const before = systemClock.now();
  const response = await fetch(`${url}/health`, { method: 'HEAD', signal: AbortSignal.timeout(5_000) });
  await response.body?.cancel();
  const middle = (before + systemClock.now()) / 2;
  const theirs = Date.parse(response.headers.get('date') ?? '');
  if (Number.isNaN(theirs)) {
    return { name, state: 'warn', finding: 'the dispatcher does not tell its time', todo: null };
  }
  const offset = Math.max(0, Math.abs(theirs + 500 - middle) - 500);
  return offset > MAX_CLOCK_OFFSET_MS
    ? {
        name,
        state: 'warn',
        finding: `${formatDuration(offset)} apart from the dispatcher's`,
        todo: 'set both clocks by NTP: tokens and leases carry times',
      }
    : { name, state: 'ok', finding: "agrees with the dispatcher's", todo: null };
}

async function runnerModule(spec: RunnerSpec): Promise<Check> {
  const { openRunners, closeRunners } = await import('./embed-runners.ts');
  const { createLogger } = await import('@millrace/node');
  const name = 'runner';
  try {
    const runners = await openRunners([spec], createLogger({ format: 'text', level: 'error' }));
    const capability = runners[0]?.capability ?? '';
    await closeRunners(runners);
    return {
      name,
      state: 'ok',
      finding: `${capability} ${'module' in spec ? `from ${spec.module}` : 'made by the config file'}`,
      todo: null,
    };
  } catch (error) {
    return {
      name,
      state: 'fail',
      finding: MillraceError.from(error).message,
      todo: 'mend the module, or take it out of the config file',
    };
  }
}
