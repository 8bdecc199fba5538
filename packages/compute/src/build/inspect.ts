/** What there is to know about an artifact without running it. */
import { refOf } from '../artifact.ts';
import { computeError } from '../errors.ts';
import type { Limits } from '../limits.ts';
import { formatRef } from '../ref.ts';
import { inspectModule } from '../wasm/inspect.ts';
import type { ModuleSummary } from '../wasm/inspect.ts';

export type ComputeSummary = {
  readonly ref: string;
  readonly bytes: number;
} & (
  | ({ readonly engine: 'wasm' } & ModuleSummary)
  | {
      readonly engine: 'quickjs';
      /** Modules the text imports. Built computes have none. */
      readonly imports: readonly string[];
      /** Names it exports; a compute has `default`. */
      readonly exports: readonly string[];
      /** QuickJS brings its own: it needs 6 MiB at least. */
      readonly memory: null;
      /** Why the engine would refuse it; `null` when it would not. */
      readonly refusal: string | null;
    }
);

/**
 * Looks into an artifact: WebAssembly when it begins like it, JavaScript otherwise.
 *
 * @throws MillraceError `invalid_argument` (reason `module`) when it is neither.
 */
export async function inspectCompute(
  bytes: Uint8Array,
  limits: Partial<Limits> = {},
): Promise<ComputeSummary> {
  const ref = formatRef(refOf(bytes));
  if (bytes[0] === 0 && bytes[1] === 0x61) {
    const summary = inspectModule(bytes, limits);
    return { ref, engine: 'wasm', ...summary, refusal: summary.refusal ?? invalidity(bytes) };
  }
  const text = new TextDecoder('utf-8', { fatal: true });
  let code: string;
  try {
    code = text.decode(bytes);
  } catch {
    throw neither('it is not UTF-8 text, and does not begin with \\0asm');
  }
  const { build } = await import('esbuild');
  const result = await build({
    stdin: { contents: code, loader: 'js', sourcefile: 'compute.js' },
    bundle: true,
    write: false,
    metafile: true,
    format: 'esm',
    logLevel: 'silent',
    external: ['*'],
    tsconfigRaw: {},
  }).catch((error: unknown) => {
    throw neither((error as Error).message.split('\n').at(1) ?? 'it does not parse');
  });
  const [output] = Object.values(result.metafile.outputs);
  const imports = (output?.imports ?? []).map((one) => one.path);
  const exports = output?.exports ?? [];
  const refusal =
    imports.length > 0
      ? `it imports ${imports.join(', ')}; build it into one file`
      : exports.includes('default')
        ? null
        : 'it has no default export';
  return { ref, engine: 'quickjs', bytes: bytes.byteLength, imports, exports, memory: null, refusal };
}

/** What V8 has against a module that is well formed, or `null`. */
export function invalidity(wasm: Uint8Array): string | null {
  return WebAssembly.validate(wasm) ? null : 'module refused: it is not valid WebAssembly';
}

function neither(why: string): Error {
  return computeError(
    'invalid_argument',
    'module',
    `compute: neither WebAssembly nor a JavaScript module: ${why}`,
  );
}
