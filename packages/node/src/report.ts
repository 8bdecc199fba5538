/** The one message that ends a lease: what it says, and how it is delivered. */
import {
  MillraceError,
  describeError,
  sleep,
  type Clock,
  type JsonObject,
  type LeaseEnvelope,
  type Logger,
  type Random,
} from '@millrace/runner';
import type { ArtifactReport, Dms, EndingReport, LeaseHandle } from '@millrace/dispatch/client';
import { attemptTimeoutMs, backoffMs, callWithin, isBodyRefused, isLeaseGone } from './retry.ts';

/** The longest `reason`, bytes of UTF-8; the bound newer posemesh nodes keep. */
export const MAX_REASON_BYTES = 4096;

/** How far setup got: the wire's own words. */
export type SetupStage = 'start_session' | 'initial_heartbeat' | 'build_ports';

export type Report =
  | {
      readonly kind: 'complete';
      readonly body: { readonly output_cids: readonly string[]; readonly meta: EndingReport };
    }
  | {
      readonly kind: 'fail';
      readonly body: {
        readonly reason: string;
        readonly details: EndingReport | { readonly stage: SetupStage; readonly error: string };
      };
    }
  | {
      readonly kind: 'release';
      readonly reason: 'shutdown' | 'canceled';
      /** Only for a dispatcher that keeps it. */
      readonly details?: JsonObject;
    };

export function completeReport(lease: LeaseEnvelope, artifacts: readonly ArtifactReport[]): Report {
  const output_cids = artifacts.flatMap(({ id }) => (id === null ? [] : [id]));
  return { kind: 'complete', body: { output_cids, meta: endingReport(lease, artifacts) } };
}

/** The runner was entered and failed, with the messages of the error and its causes. */
export function runnerFailedReport(
  lease: LeaseEnvelope,
  artifacts: readonly ArtifactReport[],
  error: unknown,
): Report {
  const prefix = 'runner failed: ';
  const reason = prefix + describeError(error, MAX_REASON_BYTES - prefix.length);
  const details = bounded(endingReport(lease, artifacts));
  return {
    kind: 'fail',
    body: { reason, details: isFinal(error) ? { ...details, retryable: false } : details },
  };
}

/** The first heartbeat changed the task to one no runner here can do. */
export function noRunnerReport(lease: LeaseEnvelope): Report {
  return {
    kind: 'fail',
    body: {
      reason: `no runner registered for capability: ${lease.task.capability}`,
      details: endingReport(lease, []),
    },
  };
}

/** The node's own fault, before the runner was entered. */
export function setupFailedReport(stage: SetupStage, error: unknown): Report {
  return {
    kind: 'fail',
    body: {
      reason: 'node_setup_failed',
      details: { stage, error: describeError(error, MAX_REASON_BYTES) },
    },
  };
}

/** The report with what the attempt used, for a dispatcher that takes it. */
export function withUsage(report: Report, usage: JsonObject): Report {
  if (report.kind === 'release') return { ...report, details: { usage } };
  return report.kind === 'complete'
    ? { ...report, body: { ...report.body, meta: { ...report.body.meta, usage } } }
    : { ...report, body: { ...report.body, details: { ...report.body.details, usage } } };
}

/** Newer services take 64 KiB of details, which the list of artifacts may outgrow; the rest is for what comes beside it. */
const MAX_ARTIFACTS_BYTES = 60 * 1024;

/** As many artifacts as fit, and how many do not. A completion needs all of them, a failure does not. */
function bounded(details: EndingReport): EndingReport {
  let bytes = 0;
  const fits = details.artifacts.findIndex((artifact) => {
    bytes += Buffer.byteLength(JSON.stringify(artifact)) + 1;
    return bytes > MAX_ARTIFACTS_BYTES;
  });
  if (fits === -1) return details;
  return {
    ...details,
    artifacts: details.artifacts.slice(0, fits),
    artifacts_omitted: details.artifacts.length - fits,
  };
}

function endingReport(lease: LeaseEnvelope, artifacts: readonly ArtifactReport[]): EndingReport {
  const { task } = lease;
  return {
    job: {
      task_id: task.id,
      job_id: task.job_id,
      domain_id: lease.domain_id,
      capability: task.capability,
    },
    artifacts: artifacts.map(({ logical_path, name, data_type, id }) => ({
      logical_path,
      name,
      data_type,
      id,
    })),
  };
}

/**
 * Whether another attempt would end the same way. Ours say so by their code (their `retryable` is about the same call,
 * not about another attempt on another node) or by `details.final`, other errors by a `retryable` that is false.
 */
export function isFinal(error: unknown): boolean {
  if (MillraceError.is(error)) {
    const { code, details } = error;
    return code === 'invalid_argument' || code === 'unimplemented' || details['final'] === true;
  }
  return (
    typeof error === 'object' && error !== null && (error as { retryable?: unknown }).retryable === false
  );
}

/**
 * - `accepted` the dispatcher has it
 * - `refused` the lease is gone (404, 409, 410), or no form of it will ever be taken; nothing more is to be sent
 * - `unsent` not delivered while there was a chance that it is taken; the lease lapses
 */
export type Delivery = 'accepted' | 'refused' | 'unsent';

export interface DeliveryOptions {
  readonly dms: Pick<Dms, 'complete' | 'fail' | 'release'>;
  readonly lease: LeaseHandle;
  /** When the lease is over, monotonic; asked again each time, since heartbeats go on extending it meanwhile. */
  readonly deadline: () => number;
  /** How long after it the report is still tried. Default 0. */
  readonly graceMs?: number;
  readonly requestTimeoutMs: number;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  /** Gives up. */
  readonly signal: AbortSignal;
}

const RETRY = { baseMs: 200, capMs: 5_000 };

/** Sends a report until it is answered or the time for it is over; tried once even after that. Never rejects. */
export async function deliver(report: Report, options: DeliveryOptions): Promise<Delivery> {
  const { clock, random, log, signal, graceMs = 0 } = options;
  for (let failures = 1; ; failures += 1) {
    const leftMs = options.deadline() - clock.monotonic();
    try {
      await callWithin(
        clock,
        attemptTimeoutMs(leftMs, options.requestTimeoutMs, leftMs + graceMs),
        report.kind,
        (callSignal) => send(report, options.dms, options.lease, callSignal),
        signal,
      );
      return 'accepted';
    } catch (error) {
      if (signal.aborted) return 'unsent';
      if (isLeaseGone(error)) {
        log.warn('the dispatcher says the lease is gone', {
          report: report.kind,
          error: describeError(error),
        });
        return 'refused';
      }
      if (isBodyRefused(error) || (MillraceError.is(error) && error.code === 'unimplemented')) {
        log.error('the dispatcher refused the report', { report: report.kind, error: describeError(error) });
        return report.kind === 'complete'
          ? await deliver(refusedCompletion(report, error), options)
          : 'refused';
      }
      const pauseMs = backoffMs(failures, RETRY, random, error);
      const stillLeftMs = options.deadline() - clock.monotonic();
      log.warn('the report did not arrive', {
        report: report.kind,
        error: describeError(error),
        failures,
        lease_left_ms: Math.round(stillLeftMs),
      });
      if (pauseMs >= stillLeftMs + graceMs) return 'unsent';
      try {
        await sleep(clock, pauseMs, signal);
      } catch {
        return 'unsent';
      }
    }
  }
}

async function send(
  report: Report,
  dms: DeliveryOptions['dms'],
  lease: LeaseHandle,
  signal: AbortSignal,
): Promise<void> {
  switch (report.kind) {
    case 'complete':
      return await dms.complete(lease, report.body, { signal });
    case 'fail':
      return await dms.fail(lease, report.body, { signal });
    case 'release':
      return await dms.release(lease, report.reason, {
        signal,
        ...(report.details !== undefined && { details: report.details }),
      });
  }
}

/** Silence would let the lease lapse and the work be done again, for nobody to learn why. */
function refusedCompletion(report: Report & { kind: 'complete' }, error: unknown): Report {
  const prefix = 'completion refused by the dispatcher: ';
  return {
    kind: 'fail',
    body: {
      reason: prefix + describeError(error, MAX_REASON_BYTES - prefix.length),
      details: { ...report.body.meta, artifacts: [] },
    },
  };
}
