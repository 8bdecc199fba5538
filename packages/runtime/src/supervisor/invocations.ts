/** The subcommands of a runtime that stand alone: test, offer-template, deploy, and what it is called. */
import path from 'node:path';
import { systemClock, type Clock } from '@millrace/runner';
import type { RuntimeMode, Volume } from '../sdk/runtime.ts';
import { CAPTURE_ALL, OutputCapture } from './capture.ts';
import { EMPTY_OFFER, parseOffer, type OfferTemplate } from './deploy-output.ts';
import { runtimeEnvironment } from './environment.ts';
import { checkLimits } from './limits.ts';
import { startOneShot } from './one-shot.ts';
import { ActivityProcesses } from './activity-processes.ts';
import { RuntimeSupervisor, type DeployRequest, type SupervisorOptions } from './runtime-supervisor.ts';

export interface InvocationOptions {
  readonly runtimePath: string;
  /** Words put before the subcommand. */
  readonly args?: readonly string[];
  /** Variables granted beyond the harmless ones. */
  readonly env?: Readonly<Record<string, string>>;
  /** Default 60 s. */
  readonly timeoutMs?: number;
  readonly signal?: AbortSignal;
  readonly clock?: Clock;
}

export interface InvocationResult {
  /** -1 after a signal. */
  readonly exitCode: number;
  /** The first MiB of each. */
  readonly stdout: string;
  readonly stderr: string;
  readonly durationMs: number;
}

const DEFAULT_TIMEOUT_MS = 60_000;

/** Runs the self-test: passed when the exit code is 0. @throws MillraceError when it cannot be started or does not end in time. */
export function testRuntime(options: InvocationOptions): Promise<InvocationResult> {
  return invoke(options, 'test');
}

/**
 * What the runtime adds to an offer. A runtime that fails adds nothing, as with the supervisors in use; its exit code tells.
 *
 * @throws MillraceError `data_loss` for output that is no template, and as {@link testRuntime}.
 */
export async function offerOf(
  options: InvocationOptions,
): Promise<InvocationResult & { readonly offer: OfferTemplate }> {
  const result = await invoke(options, 'offer-template');
  return { ...result, offer: result.exitCode === 0 ? parseOffer(result.stdout) : EMPTY_OFFER };
}

/** Name and version as `--version` prints them; null when it prints something else. */
export async function versionOf(
  options: InvocationOptions,
): Promise<{ readonly name: string; readonly version: string } | null> {
  const { exitCode, stdout } = await invoke(options, '--version');
  const [, name, version] = /^(\S+) v?(\d+\.\d+\.\d+\S*)\s*$/.exec(stdout) ?? [];
  return exitCode === 0 && name !== undefined && version !== undefined ? { name, version } : null;
}

export interface DeployRuntimeOptions extends Omit<SupervisorOptions, 'runtime' | 'onEvent' | 'onFrame'> {
  readonly runtimePath: string;
  readonly request?: DeployRequest;
  readonly signal?: AbortSignal;
}

export interface DeployRuntimeResult {
  readonly exitCode: number;
  readonly mode: RuntimeMode;
  readonly volumes: readonly Volume[];
  readonly stdout: string;
  readonly stderr: string;
}

/** Deploys and leaves it at that. @throws as {@link RuntimeSupervisor.deploy}. */
export async function deployRuntime(options: DeployRuntimeOptions): Promise<DeployRuntimeResult> {
  await using supervisor = new RuntimeSupervisor({ ...options, runtime: options.runtimePath });
  const result = await supervisor.deploy(options.request, options.signal ? { signal: options.signal } : {});
  return {
    exitCode: result.exitCode,
    mode: supervisor.mode,
    volumes: result.volumes,
    stdout: Buffer.from(result.stdout.bytes).toString('utf8'),
    stderr: Buffer.from(result.stderr.bytes).toString('utf8'),
  };
}

async function invoke(options: InvocationOptions, subcommand: string): Promise<InvocationResult> {
  const { clock = systemClock, signal } = options;
  signal?.throwIfAborted();
  const limits = checkLimits();
  const captures = {
    stdout: new OutputCapture(CAPTURE_ALL, limits.captureBytes),
    stderr: new OutputCapture(CAPTURE_ALL, limits.captureBytes),
  };
  const startedAt = clock.monotonic();
  const processes = new ActivityProcesses(clock);
  try {
    const oneShot = await startOneShot(processes, clock, {
      file: path.resolve(options.runtimePath),
      args: [...(options.args ?? []), subcommand],
      cwd: undefined,
      env: runtimeEnvironment(process.env, options.env),
      timeoutMs: options.timeoutMs ?? DEFAULT_TIMEOUT_MS,
      graceMs: limits.killGraceMs,
      outputBytes: limits.outputBytes,
      onOutput: (stream, chunk) => captures[stream].push(chunk),
    });
    const onAbort = (): void => oneShot.stop(signal?.reason);
    signal?.addEventListener('abort', onAbort, { once: true });
    try {
      const exit = await oneShot.ended;
      return {
        exitCode: exit.code ?? -1,
        stdout: Buffer.from(captures.stdout.result().bytes).toString('utf8'),
        stderr: Buffer.from(captures.stderr.result().bytes).toString('utf8'),
        durationMs: clock.monotonic() - startedAt,
      };
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  } finally {
    await processes.close();
  }
}
