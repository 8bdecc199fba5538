/** Submitting a job with local inputs: look at every file, upload, then submit. */
import type { Requestor } from '@millrace/dispatch/client';
import type { Io } from './io.ts';
import { collectInputs, replaceInputs, type InputSource, type JobFile } from './job-file.ts';
import { oneLine } from './text-width.ts';
import { uploadInput } from './transfer.ts';
import { formatBytes } from './units.ts';

/** Uploads longer than this are talked about, as often. */
const NOTE_MS = 2_000;

/**
 * Resolves with the job's id.
 *
 * @throws MillraceError `invalid_argument` for local inputs that cannot be used, before anything is sent.
 */
export async function submitWithInputs(
  io: Io,
  requestor: Requestor,
  file: JobFile,
  named: ReadonlyMap<string, InputSource>,
  options: { readonly signal: AbortSignal; readonly idempotencyKey?: string },
): Promise<string> {
  const { signal, idempotencyKey } = options;
  const sources = await collectInputs(file, named);
  let { job } = file;
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
  return await requestor.submit(job, { signal, ...(idempotencyKey !== undefined && { idempotencyKey }) });
}
