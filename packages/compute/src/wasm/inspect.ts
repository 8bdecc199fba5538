/** What a module declares, without running or compiling it. */
import { readModule } from './module.ts';
import type { FunctionType, ModuleExport, ModuleImport, SizeRange, TableType, WasmModule } from './module.ts';
import { foreignNamespace } from './plugin.ts';
import type { Limits } from '../limits.ts';
import { resolveLimits } from '../limits.ts';
import { rewriteModule } from './rewrite.ts';
import type { ModuleRole } from './rewrite.ts';

export interface ModuleSummary {
  readonly bytes: number;
  readonly imports: readonly ModuleImport[];
  readonly exports: readonly (ModuleExport & { readonly type?: FunctionType })[];
  /** In pages of 64 KiB; `null` when it has none of its own. */
  readonly memory: SizeRange | null;
  readonly tables: readonly TableType[];
  /** Defined in the module. */
  readonly functions: number;
  /** The plugin it has to be linked to, by its module name; `null`: it is a program by itself. */
  readonly linkedTo: string | null;
  readonly hasStartSection: boolean;
  readonly customSections: readonly { readonly name: string; readonly bytes: number }[];
  /**
   * Why the `wasm` engine would refuse it under the limits; `null` when it would not. V8 may still find a type error, and a
   * plugin may lack what a module linked to it imports.
   */
  readonly refusal: string | null;
}

/**
 * Takes a WebAssembly module apart.
 *
 * @throws MillraceError `invalid_argument` (reason `module`) when it is not one, or uses what core 2.0 does not have.
 */
export function inspectModule(wasm: Uint8Array, limits: Partial<Limits> = {}): ModuleSummary {
  const module = readModule(wasm, { maxFunctions: Infinity, maxImports: Infinity });
  let refusal: string | null = null;
  try {
    const resolved = resolveLimits(limits);
    rewriteModule(readModule(wasm, resolved), resolved, roleOf(module));
  } catch (error) {
    refusal = (error as Error).message;
  }
  return {
    bytes: wasm.byteLength,
    imports: module.imports,
    exports: module.exports.map((one) => {
      const type = one.kind === 'function' ? module.functions[one.index] : undefined;
      return type === undefined ? one : { ...one, type };
    }),
    memory: module.memory,
    tables: module.tables,
    functions: module.bodies.length,
    linkedTo: pluginOf(module),
    hasStartSection: module.start !== null,
    customSections: module.sections.flatMap(({ name, payload: [start, end] }) =>
      name === null ? [] : [{ name, bytes: end - start }],
    ),
    refusal,
  };
}

/** Javy's plugins, which are the ones modules found in the wild are linked to. */
function pluginOf(module: WasmModule): string | null {
  const namespace = foreignNamespace(module);
  return namespace !== null && /^javy[-_]/.test(namespace) ? namespace : null;
}

/** Without the plugin it is taken to have whatever the module imports. */
function roleOf(module: WasmModule): ModuleRole {
  const namespace = pluginOf(module);
  if (namespace === null) return 'command';
  const functions = new Map<string, FunctionType>();
  for (const one of module.imports) if (one.kind === 'function') functions.set(one.name, one.type);
  return { linkedTo: { namespace, functions, memory: { min: Number.MAX_SAFE_INTEGER, max: null } } };
}
