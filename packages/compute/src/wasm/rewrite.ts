/**
 * Makes a module safe to hand to V8, in its bytes: what is decided here holds whatever the code does.
 *
 * | gap between V8 and the reference | closed by | test (hostile.test.ts) |
 * | --- | --- | --- |
 * | no cap on memory; a worker's `resourceLimits` do not count it | the maximum of its memory type | "memory …" |
 * | no cap on tables | the maximum of each table type | "a table …" |
 * | imported memory could be larger than the cap | made the module's own: with one memory, index 0 stays index 0 | "an imported memory …" |
 * | unexported memory cannot be reached by the host | a private export | "a memory it does not export" |
 * | the start section runs before the host knows the memory | a private export the host calls instead | "… from the start section" |
 * | imports of a wrong type are accepted, arguments coerced | types compared with WASI's | "an import with a wrong type" |
 * | `_start` with parameters is accepted | its type checked | "_start with a parameter" |
 * | exceptions, threads, tail calls and more are on | `instructions.ts`, `module.ts` | "… is refused" |
 * | an exit can be caught and the guest goes on | no exceptions; the exit sticks (`wasi.ts`) | "… after proc_exit" |
 * | pointers arrive signed | `wasi.ts` | "… pointer …" |
 * | a loop around long instructions cannot be interrupted | a call before each, see {@link interruptible} | "filling its memory …" |
 *
 * Names in a `name` section are kept, for readable traces; other custom sections are dropped, since V8 gives meaning to some.
 */
import { PAGES_PER_MB } from '../limits.ts';
import {
  Cursor,
  concatBytes,
  moduleError,
  moduleLimit,
  nameBytes,
  sectionBytes,
  u32Bytes,
} from './binary.ts';
import { SECTION } from './module.ts';
import type { FunctionType, ModuleImport, SizeRange, WasmModule } from './module.ts';
import { PLUGIN_MEMORY } from './plugin.ts';
import type { PluginFace } from './plugin.ts';
import { WASI_MODULE, WASI_TYPES } from './wasi-types.ts';

export interface RewriteLimits {
  readonly maxMemoryMb: number;
  readonly maxTableEntries: number;
}

export interface RewrittenModule {
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** Exports that give the host the memory, and what to call, in order. `null`: the module has none. */
  readonly memory: string | null;
  readonly entries: readonly string[];
}

/** The one import besides WASI: what linkers emit for a module that wants its memory made for it. */
const IMPORTED_MEMORY = ['env', 'memory'] as const;

/**
 * What a module is to be: a program by itself, the plugin of others, or a program linked against a plugin.
 */
export type ModuleRole = 'command' | 'plugin' | { readonly linkedTo: PluginFace };

/**
 * The module rewritten for the limits. Of a plugin only the start section is an entry; a linked module keeps its import of the
 * plugin's memory, and has none of its own.
 *
 * @throws MillraceError reason `module`: an import that is not granted, by name; a wrong type; nothing to run; a memory or
 * table that starts larger than the limit.
 */
export function rewriteModule(
  module: WasmModule,
  limits: RewriteLimits,
  role: ModuleRole = 'command',
): RewrittenModule {
  const maxPages = limits.maxMemoryMb * PAGES_PER_MB;
  const linkedTo = typeof role === 'object' ? role.linkedTo : null;
  for (const one of module.imports) {
    if (linkedTo === null) checkImport(one);
    else checkLinkedImport(one, linkedTo);
  }
  if (linkedTo !== null && module.memory !== null) {
    throw moduleError(`it has a memory of its own; linked to ${linkedTo.namespace} it shares the plugin's`);
  }
  const imported = module.imports.find((one) => one.kind === 'memory')?.type;
  const memory = linkedTo === null ? (module.memory ?? imported ?? null) : null;
  if (memory !== null && memory.min > maxPages) {
    throw moduleLimit(
      'maxMemoryMb',
      limits.maxMemoryMb,
      `its memory has a minimum of ${memory.min} pages (${memory.min / PAGES_PER_MB} MiB)`,
    );
  }
  for (const table of module.tables) {
    if (table.min > limits.maxTableEntries) {
      throw moduleLimit(
        'maxTableEntries',
        limits.maxTableEntries,
        `a table has a minimum of ${table.min} entries`,
      );
    }
  }

  const taken = new Set(module.exports.map((one) => one.name));
  const privateName = (base: string): string => {
    let name = base;
    while (taken.has(name)) name += "'";
    return name;
  };
  const memoryExport = memory === null ? null : privateName('millrace:memory');
  const startExport = module.start === null ? null : privateName('millrace:start');
  if (module.start !== null) checkEntry(module.functions[module.start], 'the start function');
  const entries = startExport === null ? [] : [startExport];
  for (const name of role === 'plugin' ? [] : ['_initialize', '_start']) {
    const found = module.exports.find((one) => one.name === name);
    if (found === undefined) continue;
    if (found.kind !== 'function') throw moduleError(`its export ${name} is a ${found.kind}, not a function`);
    checkEntry(module.functions[found.index], `its export ${name}`);
    entries.push(name);
  }
  if (entries.length === 0 && role !== 'plugin') {
    throw moduleError(
      'it exports no function _start, so there is nothing to run; a compute is a WASI command (a program, not a library)',
    );
  }

  const own: (Uint8Array | readonly number[])[] = [];
  if (memoryExport !== null) own.push(nameBytes(memoryExport), [2, 0]);
  if (startExport !== null) own.push(nameBytes(startExport), [0], u32Bytes(module.start ?? 0));
  const ownCount = (memoryExport === null ? 0 : 1) + (startExport === null ? 0 : 1);

  const pieces: (Uint8Array | readonly number[])[] = [module.bytes.subarray(0, 8)];
  const whole = new Map(module.sections.map((section) => [section.id, section]));
  const long = module.long.some((places) => places.length > 0);
  const emit = (id: number): void => {
    const section = whole.get(id);
    const raw = (): Uint8Array | null =>
      section === undefined ? null : module.bytes.subarray(...section.payload);
    switch (id) {
      case SECTION.import:
        if (linkedTo !== null) break;
        if (section !== undefined) pieces.push(...sectionBytes(id, functionImports(module, section.payload)));
        return;
      case SECTION.table:
        if (module.tables.length === 0) return;
        pieces.push(
          ...sectionBytes(id, [
            u32Bytes(module.tables.length),
            ...module.tables.map((table) => [
              table.element === 'funcref' ? 0x70 : 0x6f,
              ...clamped(table, limits.maxTableEntries),
            ]),
          ]),
        );
        return;
      case SECTION.memory:
        if (memory !== null) pieces.push(...sectionBytes(id, [[1, ...clamped(memory, maxPages)]]));
        return;
      case SECTION.export: {
        const payload = raw();
        if (ownCount === 0) {
          if (section !== undefined) pieces.push(module.bytes.subarray(...section.whole));
          return;
        }
        const cursor = payload === null ? null : new Cursor(payload);
        const count = cursor?.u32() ?? 0;
        const rest = payload === null || cursor === null ? [] : payload.subarray(cursor.at);
        pieces.push(...sectionBytes(id, [u32Bytes(count + ownCount), rest, ...own]));
        return;
      }
      case SECTION.start:
        return;
      case SECTION.type:
      case SECTION.function:
      case SECTION.code: {
        const payload = raw();
        if (payload === null || !long) break;
        pieces.push(...sectionBytes(id, interruptible(module, id, payload)));
        return;
      }
      default:
    }
    if (section !== undefined) pieces.push(module.bytes.subarray(...section.whole));
  };
  for (const id of [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 10, 11]) emit(id);
  for (const section of module.sections) {
    if (section.name === 'name') pieces.push(module.bytes.subarray(...section.whole));
  }
  return { bytes: concatBytes(pieces), memory: memoryExport, entries };
}

/**
 * A section of the module with an empty function added, and in the code a call of it before each instruction that can take long.
 *
 * V8 looks for interrupts when a function is entered, but in the loops of code that is not optimised yet only after so
 * many bytes of code. For a loop of ordinary instructions that is less than a millisecond; for one that only fills 32 MB
 * again and again it is some ten thousand rounds: one such loop was still running five seconds after its worker was
 * terminated, and was given up on.
 * The call costs about a nanosecond.
 */
function interruptible(
  module: WasmModule,
  id: number,
  payload: Uint8Array,
): (Uint8Array | readonly number[])[] {
  const cursor = new Cursor(payload);
  const count = u32Bytes(cursor.u32() + 1);
  const rest = payload.subarray(cursor.at);
  if (id === SECTION.type) return [count, rest, [0x60, 0, 0]];
  if (id === SECTION.function) return [count, rest, u32Bytes(module.types.length)];
  const call = [0x10, ...u32Bytes(module.functions.length)];
  const pieces: (Uint8Array | readonly number[])[] = [count];
  for (const [index, [start, end]] of module.bodies.entries()) {
    const long = module.long[index] ?? [];
    pieces.push(u32Bytes(end - start + long.length * call.length));
    let from = start;
    for (const at of long) {
      pieces.push(module.bytes.subarray(from, at), call);
      from = at;
    }
    pieces.push(module.bytes.subarray(from, end));
  }
  pieces.push([2, 0, 0x0b]);
  return pieces;
}

function clamped(range: SizeRange, cap: number): number[] {
  return [1, ...u32Bytes(range.min), ...u32Bytes(Math.min(range.max ?? cap, cap))];
}

/** The import section without the memory, which has become the module's own. */
function functionImports(
  module: WasmModule,
  payload: readonly [number, number],
): (Uint8Array | readonly number[])[] {
  if (module.imports.every((one) => one.kind === 'function')) return [module.bytes.subarray(...payload)];
  const cursor = new Cursor(module.bytes, ...payload);
  const kept: Uint8Array[] = [];
  cursor.u32();
  for (const one of module.imports) {
    const start = cursor.at;
    cursor.name();
    cursor.name();
    cursor.skip(1);
    if (one.kind === 'function') {
      cursor.u32();
      kept.push(module.bytes.subarray(start, cursor.at));
      continue;
    }
    const flags = cursor.byte();
    cursor.u32();
    if (flags === 1) cursor.u32();
  }
  return [u32Bytes(kept.length), ...kept];
}

function checkImport(one: ModuleImport): void {
  const name = `${JSON.stringify(one.module)} ${JSON.stringify(one.name)}`;
  if (one.kind === 'memory' && one.module === IMPORTED_MEMORY[0] && one.name === IMPORTED_MEMORY[1]) return;
  if (one.module !== WASI_MODULE) {
    const hint = one.module.startsWith('javy')
      ? '; to be linked to that plugin it has to be given the file'
      : '';
    throw moduleError(
      `it imports the ${one.kind} ${name}; a compute may import functions of ${WASI_MODULE} and the memory "env" "memory"${hint}`,
    );
  }
  const wanted = WASI_TYPES[one.name];
  if (one.kind !== 'function' || wanted === undefined || !Object.hasOwn(WASI_TYPES, one.name)) {
    throw moduleError(`it imports the ${one.kind} ${name}, which WASI preview 1 does not have`);
  }
  const given = signature(one.type);
  const want = signature(wanted);
  if (given !== want) throw moduleError(`it imports ${name} as ${given}; its type is ${want}`);
}

/** Of a module that is linked to a plugin: nothing but what the plugin has, exactly. */
function checkLinkedImport(one: ModuleImport, { namespace, functions, memory }: PluginFace): void {
  const name = `${JSON.stringify(one.module)} ${JSON.stringify(one.name)}`;
  if (one.module !== namespace) {
    throw moduleError(
      `it imports the ${one.kind} ${name}; linked to ${namespace} it may import from there alone`,
    );
  }
  if (one.kind === 'memory' && one.name === PLUGIN_MEMORY) {
    // With a maximum it could not be linked to a memory that may grow to the limit.
    if (one.type.min <= memory.min && one.type.max === null) return;
    throw moduleError(
      `it imports the memory ${name} from ${one.type.min} to ${one.type.max ?? 'any number of'} pages; the plugin's starts with ${memory.min} and has no maximum a module may rely on`,
    );
  }
  const wanted = one.kind === 'function' ? functions.get(one.name) : undefined;
  if (one.kind !== 'function' || wanted === undefined) {
    throw moduleError(`it imports the ${one.kind} ${name}, which the plugin does not have`);
  }
  const given = signature(one.type);
  const want = signature(wanted);
  if (given !== want) throw moduleError(`it imports ${name} as ${given}; in the plugin its type is ${want}`);
}

function checkEntry(type: FunctionType | undefined, what: string): void {
  if (type === undefined) throw moduleError(`${what} does not exist`);
  if (type.params.length > 0) {
    throw moduleError(`${what} takes ${type.params.length} parameters; nothing would give it any`);
  }
}

function signature(type: FunctionType): string {
  return `(${type.params.join(' ')}) -> (${type.results.join(' ')})`;
}
