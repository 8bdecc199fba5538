/** Submitting a job with local inputs and code: look at every file, build, store, upload, then submit. */
import type { BuiltCompute } from '@millrace/compute';
import type { JobSubmission, Requestor } from '@millrace/dispatch/client';
import { isTraceparent, type Json } from '@millrace/runner';
import type { Io } from './io.ts';
import { collectInputs, replaceInputs, type InputSource, type JobFile } from './job-file.ts';
import { oneLine } from './text-width.ts';
import { uploadInput } from './transfer.ts';
import { formatBytes } from './units.ts';

/** Uploads longer than this are talked about, as often. */
const NOTE_MS = 2_000;

/** A job file whose `op://name` texts are refs of what was built for them. */
export interface BuiltJobFile extends JobFile {
  readonly computes: readonly BuiltCompute[];
}

/**
 * Builds what the `op://name` texts of a job file name: computes whose sources lie beside it. Needs no dispatcher, so
 * whatever is wrong with them is found before there has to be one.
 *
 * @throws MillraceError `invalid_argument`, `not_found` for a name without a file; what is wrong with a source, with its place.
 */
export async function buildComputes(file: JobFile): Promise<BuiltJobFile> {
  // Most jobs name none, and should not pay for loading a bundler.
  if (!JSON.stringify(file.job).includes('"op://')) return { ...file, computes: [] };
  const { resolveOps } = await import('@millrace/compute');
  // Read from JSON or YAML, so it is JSON.
  const { value, computes } = await resolveOps(file.baseDir, file.job as unknown as Json);
  return { ...file, job: value as unknown as JobSubmission, computes };
}

/**
 * Sends the inputs and code of a job, and gives the job with their ids.
 *
 * @throws MillraceError `invalid_argument` for local inputs that cannot be used, before anything is sent.
 */
export async function prepareJob(
  io: Io,
  requestor: Requestor,
  file: BuiltJobFile,
  named: ReadonlyMap<string, InputSource>,
  options: {
    readonly signal: AbortSignal;
    /** Where computes that were built on this machine are. */
    readonly dataDir: string;
  },
): Promise<JobSubmission> {
  const { signal, dataDir } = options;
  const sources = await collectInputs(file, named);
  let { job } = file;
  if (JSON.stringify(job).includes('"compute://')) {
    const { pushComputesOf } = await import('./compute-store.ts');
    await pushComputesOf(job, file.computes, { computes: requestor.computes, dataDir, signal });
  }
  if (sources.size > 0) {
    // Inputs live in the job's domain, so that has to be settled first.
    const domainId = job.domain_id ?? (await requestor.health({ signal })).domainId;
    const ids = new Map<string, string>();
    for (const [reference, source] of sources) {
      let noted = io.now();
      const onBytes = (total: number): void => {
        if (io.now() - noted < NOTE_MS) return;
        noted = io.now();
        io.stderr.write(`uploading ${oneLine(reference)}: ${formatBytes(total)}\n`);
      };
      ids.set(reference, await uploadInput(source, io.stdin, { requestor, domainId, signal, onBytes }));
    }
    job = { ...replaceInputs(job, ids), domain_id: domainId };
  }
  return job;
}

/** Like {@link prepareJob}, and submits it. Resolves with the job's id. */
export async function submitWithInputs(
  io: Io,
  requestor: Requestor,
  file: BuiltJobFile,
  named: ReadonlyMap<string, InputSource>,
  options: Parameters<typeof prepareJob>[4] & { readonly idempotencyKey?: string },
): Promise<string> {
  const { signal, idempotencyKey } = options;
  const job = await prepareJob(io, requestor, file, named, options);
  // Whoever calls us from within a trace says so by this name.
  const traceparent = io.env['TRACEPARENT'];
  return await requestor.submit(job, {
    signal,
    ...(idempotencyKey !== undefined && { idempotencyKey }),
    ...(isTraceparent(traceparent) && { traceparent }),
  });
}
