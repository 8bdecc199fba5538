/**
 * A module taken apart: its sections, and of each what has to be known to decide whether it may run and to rewrite it. All
 * of it is checked against WebAssembly core 2.0 here, before V8 sees a byte.
 */
import { Cursor, moduleError, moduleLimit } from './binary.ts';
import { checkBody, checkConstant, isRefType, isValueType, refusedType } from './instructions.ts';

export const SECTION = {
  custom: 0,
  type: 1,
  import: 2,
  function: 3,
  table: 4,
  memory: 5,
  global: 6,
  export: 7,
  start: 8,
  element: 9,
  code: 10,
  data: 11,
  dataCount: 12,
} as const;

/** In the order they must stand; data count comes before code. */
const ORDER = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 10, 11];

/** Bounds nobody needs to configure: far above what compilers emit, far below what hurts. */
const STRUCTURE = {
  types: 10_000,
  globals: 10_000,
  exports: 10_000,
  tables: 16,
  dataSegments: 100_000,
  elements: 1_000_000,
} as const;

export type ValueType = 'i32' | 'i64' | 'f32' | 'f64' | 'v128' | 'funcref' | 'externref';

export interface FunctionType {
  readonly params: readonly ValueType[];
  readonly results: readonly ValueType[];
}

export interface SizeRange {
  readonly min: number;
  /** `null`: no maximum declared. */
  readonly max: number | null;
}

export interface TableType extends SizeRange {
  readonly element: 'funcref' | 'externref';
}

export type ModuleImport = { readonly module: string; readonly name: string } & (
  | { readonly kind: 'function'; readonly type: FunctionType }
  | { readonly kind: 'memory'; readonly type: SizeRange }
  | { readonly kind: 'table'; readonly type: TableType }
  | { readonly kind: 'global'; readonly type: { readonly value: ValueType; readonly mutable: boolean } }
);

export interface ModuleExport {
  readonly name: string;
  readonly kind: 'function' | 'table' | 'memory' | 'global';
  readonly index: number;
}

export interface Section {
  readonly id: number;
  /** From its id to its last byte. */
  readonly whole: readonly [start: number, end: number];
  readonly payload: readonly [start: number, end: number];
  /** Of a custom section. */
  readonly name: string | null;
}

/** Everything but the instructions. */
export interface WasmModule {
  readonly bytes: Uint8Array;
  readonly sections: readonly Section[];
  readonly types: readonly FunctionType[];
  readonly imports: readonly ModuleImport[];
  /** Types of all functions, imported ones first. */
  readonly functions: readonly FunctionType[];
  /** Defined in the module; imported ones are in `imports`. */
  readonly tables: readonly TableType[];
  readonly memory: SizeRange | null;
  readonly exports: readonly ModuleExport[];
  /** The function the start section names. */
  readonly start: number | null;
  /** Where each body of the code section is, its length prefix not included. */
  readonly bodies: readonly (readonly [start: number, end: number])[];
  /** For each body, where instructions begin that can take long; see `rewrite.ts`. */
  readonly long: readonly (readonly number[])[];
}

export interface ModuleLimits {
  readonly maxFunctions: number;
  readonly maxImports: number;
}

const VALUE_TYPES: Readonly<Record<number, ValueType>> = {
  0x7f: 'i32',
  0x7e: 'i64',
  0x7d: 'f32',
  0x7c: 'f64',
  0x7b: 'v128',
  0x70: 'funcref',
  0x6f: 'externref',
};

const EXPORT_KINDS = ['function', 'table', 'memory', 'global'] as const;

/**
 * Takes a module apart and checks it.
 *
 * @throws MillraceError reason `module`: `invalid_argument` naming the rule it breaks, or `resource_exhausted` naming the
 * limit and the value.
 */
export function readModule(bytes: Uint8Array, limits: ModuleLimits): WasmModule {
  return new Reader(bytes, limits).read();
}

class Reader {
  readonly #bytes: Uint8Array;
  readonly #limits: ModuleLimits;
  readonly #sections: Section[] = [];
  readonly #types: FunctionType[] = [];
  readonly #imports: ModuleImport[] = [];
  readonly #functions: FunctionType[] = [];
  readonly #tables: TableType[] = [];
  #memory: SizeRange | null = null;
  readonly #exports: ModuleExport[] = [];
  #start: number | null = null;
  readonly #bodies: [number, number][] = [];
  readonly #long: number[][] = [];
  #importedFunctions = 0;
  #importedMemories = 0;

  constructor(bytes: Uint8Array, limits: ModuleLimits) {
    this.#bytes = bytes;
    this.#limits = limits;
  }

  read(): WasmModule {
    const bytes = this.#bytes;
    const header = [0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00];
    if (header.slice(0, 4).some((byte, index) => bytes[index] !== byte)) {
      throw moduleError('not a WebAssembly module: its first four bytes are not \\0asm');
    }
    if (header.some((byte, index) => bytes[index] !== byte)) {
      throw moduleError('not a version 1 core module (components are not supported)');
    }
    const cursor = new Cursor(bytes, header.length);
    let last = -1;
    while (!cursor.done) {
      const start = cursor.at;
      const id = cursor.byte();
      if (id === 13) {
        throw moduleError(
          'it uses exception handling (a tag section), which WebAssembly core 2.0 does not have; build it without',
          {
            feature: 'exception handling',
          },
        );
      }
      if (id > 13) throw moduleError(`unknown section ${id} at byte ${start}`);
      const payload = cursor.slice(cursor.u32());
      const range = [payload.at, payload.end] as const;
      if (id === SECTION.custom) {
        this.#sections.push({ id, whole: [start, payload.end], payload: range, name: payload.name() });
        continue;
      }
      const place = ORDER.indexOf(id);
      if (place <= last) throw moduleError(`section ${id} at byte ${start} is out of order or twice there`);
      last = place;
      this.#sections.push({ id, whole: [start, payload.end], payload: range, name: null });
      this.#section(id, payload);
      if (!payload.done)
        throw moduleError(`section ${id} goes on after what it holds, at byte ${payload.at}`);
    }
    if (this.#functions.length - this.#importedFunctions !== this.#bodies.length) {
      throw moduleError(
        `it declares ${this.#functions.length - this.#importedFunctions} functions and has ${this.#bodies.length} bodies`,
      );
    }
    return {
      bytes,
      sections: this.#sections,
      types: this.#types,
      imports: this.#imports,
      functions: this.#functions,
      tables: this.#tables,
      memory: this.#memory,
      exports: this.#exports,
      start: this.#start,
      bodies: this.#bodies,
      long: this.#long,
    };
  }

  #section(id: number, cursor: Cursor): void {
    if (id === SECTION.start) {
      this.#start = cursor.u32();
      return;
    }
    const count = cursor.u32();
    switch (id) {
      case SECTION.type:
        this.#bound('types', count);
        for (let index = 0; index < count; index += 1) this.#types.push(this.#type(cursor, index));
        return;
      case SECTION.import:
        if (count > this.#limits.maxImports) {
          throw moduleLimit('maxImports', this.#limits.maxImports, `it has ${count} imports`);
        }
        for (let index = 0; index < count; index += 1) this.#imports.push(this.#import(cursor));
        this.#importedFunctions = this.#functions.length;
        return;
      case SECTION.function:
        if (count > this.#limits.maxFunctions) {
          throw moduleLimit('maxFunctions', this.#limits.maxFunctions, `it defines ${count} functions`);
        }
        for (let index = 0; index < count; index += 1) this.#functions.push(this.#typeAt(cursor.u32()));
        return;
      case SECTION.table:
        this.#bound('tables', count);
        for (let index = 0; index < count; index += 1) this.#tables.push(tableType(cursor));
        return;
      case SECTION.memory:
        if (count + this.#importedMemories > 1) throw severalMemories();
        if (count === 1) this.#memory = memoryType(cursor);
        return;
      case SECTION.global:
        this.#bound('globals', count);
        for (let index = 0; index < count; index += 1) {
          valueType(cursor, `global ${index}`);
          mutability(cursor);
          checkConstant(cursor, `global ${index}`);
        }
        return;
      case SECTION.export:
        this.#bound('exports', count);
        for (let index = 0; index < count; index += 1) {
          const name = cursor.name();
          const kind = EXPORT_KINDS[cursor.byte()];
          if (kind === undefined) throw moduleError(`export ${JSON.stringify(name)} is of an unknown kind`);
          this.#exports.push({ name, kind, index: cursor.u32() });
        }
        return;
      case SECTION.element: {
        let entries = 0;
        for (let index = 0; index < count; index += 1) {
          entries += elementSegment(cursor, index, STRUCTURE.elements - entries);
        }
        return;
      }
      case SECTION.code:
        for (let index = 0; index < count; index += 1) {
          const body = cursor.slice(cursor.u32());
          this.#bodies.push([body.at, body.end]);
          this.#long.push(checkBody(body, this.#importedFunctions + index));
        }
        return;
      case SECTION.data:
        this.#bound('dataSegments', count);
        for (let index = 0; index < count; index += 1) {
          const flags = cursor.u32();
          if (flags > 2) throw moduleError(`data segment ${index} has the unknown flags ${flags}`);
          if (flags === 2 && cursor.u32() !== 0) throw severalMemories();
          if (flags !== 1) checkConstant(cursor, `data segment ${index}`);
          cursor.skip(cursor.u32());
        }
        return;
      default:
        // The data count: read above, and for V8 to compare.
        return;
    }
  }

  #bound(what: keyof typeof STRUCTURE, count: number): void {
    if (count > STRUCTURE[what])
      throw moduleLimit(`the number of ${what}`, STRUCTURE[what], `it has ${count}`);
  }

  #type(cursor: Cursor, index: number): FunctionType {
    const form = cursor.byte();
    if (form !== 0x60) throw refusedType(form, `type ${index}`);
    const list = (): ValueType[] => {
      const count = cursor.u32();
      // V8's own bound.
      if (count > 1_000)
        throw moduleLimit('1,000 parameters or results', 1_000, `type ${index} has ${count}`);
      return Array.from({ length: count }, () => valueType(cursor, `type ${index}`));
    };
    return { params: list(), results: list() };
  }

  #typeAt(index: number): FunctionType {
    const type = this.#types[index];
    if (type === undefined) throw moduleError(`it refers to type ${index} of ${this.#types.length}`);
    return type;
  }

  #import(cursor: Cursor): ModuleImport {
    const from = { module: cursor.name(), name: cursor.name() };
    const kind = cursor.byte();
    switch (kind) {
      case 0: {
        const type = this.#typeAt(cursor.u32());
        this.#functions.push(type);
        return { ...from, kind: 'function', type };
      }
      case 1:
        return { ...from, kind: 'table', type: tableType(cursor) };
      case 2:
        this.#importedMemories += 1;
        if (this.#importedMemories > 1) throw severalMemories();
        return { ...from, kind: 'memory', type: memoryType(cursor) };
      case 3: {
        const value = valueType(cursor, `import ${from.module}.${from.name}`);
        return { ...from, kind: 'global', type: { value, mutable: mutability(cursor) } };
      }
      default:
        throw moduleError(
          `import ${JSON.stringify(from.module)} ${JSON.stringify(from.name)} is of a kind WebAssembly core 2.0 does not have`,
        );
    }
  }
}

function severalMemories(): Error {
  return moduleError('it has more than one memory, which WebAssembly core 2.0 does not allow', {
    feature: 'multiple memories',
  });
}

function valueType(cursor: Cursor, where: string): ValueType {
  const byte = cursor.byte();
  if (!isValueType(byte)) throw refusedType(byte, where);
  return VALUE_TYPES[byte] as ValueType;
}

function mutability(cursor: Cursor): boolean {
  const byte = cursor.byte();
  if (byte > 1) throw moduleError(`a global has the unknown mutability ${byte}`);
  return byte === 1;
}

function tableType(cursor: Cursor): TableType {
  const element = cursor.byte();
  if (!isRefType(element)) throw refusedType(element, 'a table');
  return { element: VALUE_TYPES[element] as TableType['element'], ...sizeRange(cursor, 'table') };
}

function memoryType(cursor: Cursor): SizeRange {
  const range = sizeRange(cursor, 'memory');
  for (const pages of [range.min, range.max ?? 0]) {
    if (pages > 65_536) throw moduleError(`its memory of ${pages} pages is more than 4 GiB`);
  }
  return range;
}

function sizeRange(cursor: Cursor, what: 'table' | 'memory'): SizeRange {
  const flags = cursor.byte();
  if (flags > 1) {
    const features = [
      [2, 'shared memory (threads)'],
      [4, `a 64-bit ${what}`],
      [8, 'custom page sizes'],
    ] as const;
    const feature = features.find(([bit]) => (flags & bit) !== 0)?.[1] ?? `unknown ${what} flags ${flags}`;
    throw moduleError(`it uses ${feature}, which WebAssembly core 2.0 does not have; build it without`, {
      feature,
    });
  }
  const min = cursor.u32();
  const max = flags === 1 ? cursor.u32() : null;
  if (max !== null && max < min)
    throw moduleError(`its ${what} has a maximum of ${max} below its minimum of ${min}`);
  return { min, max };
}

/** Returns how many entries it has. */
function elementSegment(cursor: Cursor, index: number, left: number): number {
  const where = `element segment ${index}`;
  const flags = cursor.u32();
  if (flags > 7) throw moduleError(`${where} has the unknown flags ${flags}`);
  const active = (flags & 1) === 0;
  const explicit = (flags & 2) !== 0;
  const expressions = (flags & 4) !== 0;
  if (active && explicit) cursor.leb(5);
  if (active) checkConstant(cursor, where);
  if (!active || explicit) {
    const kind = cursor.byte();
    if (expressions ? !isRefType(kind) : kind !== 0) throw refusedType(kind, where);
  }
  const count = cursor.u32();
  if (count > left) {
    throw moduleLimit('the number of table entries set', STRUCTURE.elements, `${where} has ${count} more`);
  }
  for (let entry = 0; entry < count; entry += 1) {
    if (expressions) checkConstant(cursor, where);
    else cursor.leb(5);
  }
  return count;
}
