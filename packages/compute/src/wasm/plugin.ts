/**
 * Plugins: one large module that many small ones are linked against, as Javy does it for JavaScript. The plugin is the runtime,
 * supplied by the operator; the compute is what its author wrote, and brings no memory of its own.
 *
 * What a plugin has to be: a module that imports functions of WASI alone, exports its `memory` and a function
 * `initialize-runtime`, and says by the custom section `import_namespace` under which module name it is imported. It is
 * initialised once; every call gets a fresh instance with the memory as that left it, so its input is read by nobody
 * but the compute.
 *
 * What a compute may import is what the plugin exports, with the exact types, and the plugin's memory. The plugin is inside
 * of the same walls as the compute, so it grants nothing that the compute could not do by itself.
 */
import { moduleError } from './binary.ts';
import { WASI_MODULE } from './wasi-types.ts';
import type { FunctionType, SizeRange, WasmModule } from './module.ts';

/** What linking needs to know of a plugin. */
export interface PluginFace {
  /** The module name it is imported by. */
  readonly namespace: string;
  /** By the names they are exported as. */
  readonly functions: ReadonlyMap<string, FunctionType>;
  readonly memory: SizeRange;
}

/** The export of a plugin that makes its runtime, and what it is told on its standard input: what the reference tells it. */
export const INITIALIZE = 'initialize-runtime';
export const CONFIGURATION = '{"event-loop":true}';
export const PLUGIN_MEMORY = 'memory';

const NAMESPACE_SECTION = 'import_namespace';

/** @throws MillraceError reason `module`: it is no plugin. */
export function readPluginFace(module: WasmModule): PluginFace {
  const section = module.sections.find((one) => one.name === NAMESPACE_SECTION);
  if (section === undefined) {
    throw moduleError(`it is no plugin: it has no custom section ${NAMESPACE_SECTION}`);
  }
  const [, end] = section.payload;
  // The section's own name comes first, with its length before it.
  const start = section.payload[0] + 1 + NAMESPACE_SECTION.length;
  const namespace = Buffer.from(module.bytes.subarray(start, end)).toString('utf8');
  if (!/^[\x21-\x7e]{1,128}$/.test(namespace) || namespace === WASI_MODULE) {
    throw moduleError(
      `it is no plugin: its ${NAMESPACE_SECTION} must be 1 to 128 visible ASCII characters, got ${JSON.stringify(namespace.slice(0, 130))}`,
    );
  }
  const functions = new Map<string, FunctionType>();
  for (const one of module.exports) {
    const type = one.kind === 'function' ? module.functions[one.index] : undefined;
    if (type !== undefined) functions.set(one.name, type);
  }
  const initialize = functions.get(INITIALIZE);
  if (initialize === undefined || initialize.params.length > 0) {
    throw moduleError(`it is no plugin: it exports no function ${INITIALIZE} without parameters`);
  }
  const exported = module.exports.some((one) => one.name === PLUGIN_MEMORY && one.kind === 'memory');
  if (module.memory === null || !exported) {
    throw moduleError(`it is no plugin: it does not export a memory of its own as ${PLUGIN_MEMORY}`);
  }
  return { namespace, functions, memory: module.memory };
}

/** The module name other than WASI's a module imports functions by, if there is one. */
export function foreignNamespace(module: WasmModule): string | null {
  const found = module.imports.find((one) => one.kind === 'function' && one.module !== WASI_MODULE);
  return found?.module ?? null;
}
