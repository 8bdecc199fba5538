import { dirname } from 'node:path';
import type { MaterializedInput } from './context.ts';

/**
 * What an input source that knows nothing but the file answers: no metadata, no further files, and as `root_dir` the
 * folder `path` is in.
 */
export function materializedInput(cid: string, path: string): MaterializedInput {
  return {
    cid,
    path,
    data_id: null,
    name: null,
    data_type: null,
    domain_id: null,
    root_dir: dirname(path),
    related_files: [],
    extracted_paths: [],
  };
}
