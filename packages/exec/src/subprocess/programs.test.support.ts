/** What tests of programs need: the tiers of this machine, a way to find processes, and programs that are only text. */
import { readFileSync, readdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { MillraceError, type JsonObject } from '@millrace/runner';
import { createTestContext, type TestContext, type TestContextOptions } from '@millrace/runner/testing';
import { probeSandbox } from '../sandbox/probe.ts';
import type { SandboxControl, SandboxTier } from '../sandbox/controls.ts';
import { subprocess, type SubprocessOptions } from './subprocess.ts';
import type { SubprocessRunner } from './subprocess-runner.ts';

/** What this machine lets this user do. */
export const report = await probeSandbox();

/** A skip says what the machine lacks; where CI promises it, lacking it is a failure. */
export interface Skippable {
  skip(note?: string): void;
}

export function needsTier(context: Skippable, tier: SandboxTier): void {
  const entry = report.tiers.find((candidate) => candidate.tier === tier);
  if (entry?.available) return;
  if (process.env['CI'] === 'true' && tier === 'bwrap') throw new Error(`no bwrap in CI: ${entry?.reason}`);
  context.skip(`tier ${tier} is not available here: ${entry?.reason}`);
}

export function needsControl(context: Skippable, tier: SandboxTier, control: SandboxControl): void {
  needsTier(context, tier);
  const controls = { ...report.tiers.find((candidate) => candidate.tier === tier)?.controls };
  if (tier !== 'none') Object.assign(controls, report.cgroup.controls);
  if (controls[control] === undefined) {
    context.skip(`tier ${tier} has no control ${control} for user ${process.getuid?.()} on this machine`);
  }
}

export function needsCgroup(context: Skippable, control: SandboxControl): void {
  if (report.cgroup.controls[control] !== undefined) return;
  context.skip(
    `no control group for ${control} can be made here: ${report.cgroup.reason ?? 'the controller is missing'}`,
  );
}

/** Where Node itself is not among the system's programs, a bwrap sandbox must be shown it. */
const NODE_FOLDER = dirname(dirname(process.execPath));
export const NODE_READABLE = NODE_FOLDER.startsWith('/usr') ? [] : [NODE_FOLDER];

/** A runner around `sh -c TEXT`. */
export function shell(text: string, options: Partial<SubprocessOptions> = {}): SubprocessRunner {
  // Braces in shell text are no placeholders of ours.
  const literal = text.replaceAll(/\{([a-z]+(?::[^{}]*)?)\}/g, '{{$1}}');
  return subprocess({ capability: '/test/v1', command: 'sh', args: ['-c', literal], ...options });
}

/** A runner around `node -e TEXT`. */
export function nodeProgram(text: string, options: Partial<SubprocessOptions> = {}): SubprocessRunner {
  const literal = text.replaceAll(/\{([a-z]+(?::[^{}]*)?)\}/g, '{{$1}}');
  return subprocess({
    capability: '/test/v1',
    command: process.execPath,
    args: ['-e', literal],
    ...options,
    sandbox: { readable: NODE_READABLE, ...options.sandbox },
  });
}

export interface Ended {
  readonly ctx: TestContext;
  readonly error: unknown;
  /** The event of kind `usage`. */
  readonly usage: JsonObject;
}

/** Runs one task to its end and closes the runner. `during` is called as soon as the task runs. */
export async function perform(
  runner: SubprocessRunner,
  options: TestContextOptions = {},
  during?: (ctx: TestContext) => Promise<void>,
): Promise<Ended> {
  const ctx = createTestContext(options);
  try {
    const running = runner.run(ctx).then(
      () => null,
      (error: unknown) => error,
    );
    await during?.(ctx);
    const error = await running;
    return { ctx, error, usage: usageOf(ctx) };
  } finally {
    await runner.close();
    await ctx.close();
  }
}

/** As {@link perform}, of a task that must succeed. */
export async function succeed(runner: SubprocessRunner, options: TestContextOptions = {}): Promise<Ended> {
  const ended = await perform(runner, options);
  if (ended.error !== null) throw ended.error;
  return ended;
}

/** As {@link perform}, of a task that must fail with an error of ours. */
export async function fail(
  runner: SubprocessRunner,
  options: TestContextOptions = {},
): Promise<{ readonly error: MillraceError; readonly ctx: TestContext; readonly usage: JsonObject }> {
  const ended = await perform(runner, options);
  if (!MillraceError.is(ended.error)) throw new Error(`expected a MillraceError, got ${String(ended.error)}`);
  return { ...ended, error: ended.error };
}

function usageOf(ctx: TestContext): JsonObject {
  const found = ctx.events.find(
    (event) => typeof event === 'object' && event !== null && (event as JsonObject)['kind'] === 'usage',
  );
  return (found ?? {}) as JsonObject;
}

/** Log lines of the program, as it printed them. */
export function printed(ctx: TestContext, stream = 'stdout'): string[] {
  return ctx.logs.filter((line) => line.fields['stream'] === stream).map(({ message }) => message);
}

export async function untilPrinted(ctx: TestContext, line: string): Promise<void> {
  await until(`the program to print ${line}`, () => printed(ctx).includes(line));
}

export async function until(what: string, condition: () => boolean): Promise<void> {
  for (const deadline = performance.now() + 20_000; !condition(); await delay(5)) {
    if (performance.now() > deadline) throw new Error(`waited 20 s for ${what}`);
  }
}

let tokens = 0;

/** An argument of `sleep` that no other process has. Long enough to be found, short enough not to stay for ever. */
export function sleepToken(): string {
  tokens += 1;
  return `60.${process.pid}${tokens}${Math.floor(Math.random() * 1e6)}`;
}

/** Pids of living processes with this among their arguments. */
export function processesWith(token: string): number[] {
  return readdirSync('/proc').flatMap((name) => {
    if (!/^\d+$/.test(name)) return [];
    try {
      const args = readFileSync(`/proc/${name}/cmdline`, 'utf8').split('\0');
      return args.includes(token) ? [Number(name)] : [];
    } catch {
      return [];
    }
  });
}

export async function temporaryFolder(): Promise<{ readonly path: string } & AsyncDisposable> {
  const path = await mkdtemp(join(tmpdir(), 'millrace-exec-test-'));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}
