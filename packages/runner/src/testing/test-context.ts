/**
 * A TaskContext for unit tests of runners: inputs from memory or a folder, artifacts to memory or a folder, everything a
 * runner does recorded. It keeps the contract as strictly as the contract is written, so what passes here is not
 * refused by a node: paths that are empty or climb, writes to an upload that has ended, values that are not JSON, and
 * calls after the task has ended are errors. Names, types and the layout on disk are those of a node.
 */
import { createReadStream, readFileSync, readdirSync, rmSync, statSync } from 'node:fs';
import { mkdir, mkdtemp, open, rename, rm, writeFile } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative, resolve, sep } from 'node:path';
import { Readable } from 'node:stream';
import type {
  AccessTokenProvider,
  ArtifactSink,
  ByteStream,
  ControlPlane,
  DomainArtifactRequest,
  InputReadOptions,
  InputSource,
  LogLevel,
  Logger,
  MaterializedInput,
  MultipartUpload,
  TaskContext,
} from '../context.ts';
import { parseLease } from '../decode.ts';
import { MillraceError, TaskAbort } from '../errors.ts';
import type { AbortReason } from '../errors.ts';
import type { Json, JsonObject } from '../json.ts';
import type { LeaseEnvelope, TaskSpec } from '../lease.ts';
import { materializedInput } from '../materialized-input.ts';
import { artifactName, dataTypeOf, logicalPath, materializedPath } from './artifact-names.ts';

/** One stored item behind a CID, with the metadata a domain server keeps for it. */
export interface TestInput {
  readonly content: Uint8Array | string;
  /** Default: the CID. */
  readonly name?: string;
  /** Default: as a node derives it from the extension of `name`. */
  readonly data_type?: string;
}

export interface TestContextOptions {
  /** What each CID gives. Text is UTF-8; an array is a download of several parts. */
  readonly inputs?: Readonly<Record<string, Uint8Array | string | TestInput | readonly TestInput[]>>;
  /** Every file in this folder and below becomes an input whose CID is its path in the folder, with `/`. */
  readonly inputsDir?: string;
  /** Artifacts are streamed to files in this folder, by logical path, instead of being kept in memory. Made if missing. */
  readonly outputsDir?: string | undefined;
  /** Members of the task. Default: all inputs as `inputs_cids`, capability `/test/v1`, no meta, no outputs prefix. */
  readonly task?: Partial<TaskSpec>;
  /** Members of the lease. Default: a domain, a domain server that does not exist, and an access token. */
  readonly lease?: Partial<Omit<LeaseEnvelope, 'task'>>;
  /**
   * Called before each call on a port is performed (log lines excepted); what it throws, the call rejects with. For faults, and for acting
   * at a certain point of the work, e.g. `abort`.
   */
  readonly onCall?: (call: PortCall) => void | Promise<void>;
}

/** A call a runner made on one of its ports. */
export interface PortCall {
  readonly port: 'input' | 'output' | 'ctrl' | 'log';
  readonly method: string;
  /** The CID or path, where the method has one. */
  readonly target: string | null;
}

/** What a node would report about an artifact when the task ends. */
export interface ArtifactRecord {
  readonly logical_path: string;
  readonly name: string;
  readonly data_type: string;
  readonly id: string;
}

export interface LogLine {
  readonly level: LogLevel;
  readonly message: string;
  readonly fields: JsonObject;
}

/** A {@link TaskContext} that shows what was done with it. */
export interface TestContext extends TaskContext, AsyncDisposable {
  /** The bytes of each artifact by logical path. With `outputsDir` they are read from there when asked for. */
  readonly outputs: ReadonlyMap<string, Uint8Array>;
  /** One record per logical path, in the order first committed. */
  readonly artifacts: readonly ArtifactRecord[];
  readonly progressValues: readonly Json[];
  readonly events: readonly Json[];
  readonly logs: readonly LogLine[];
  /** Every call on a port so far. */
  readonly calls: readonly PortCall[];
  /** Calls made after {@link close}. */
  readonly lateCalls: readonly PortCall[];
  /** Multipart uploads neither finished nor aborted. */
  readonly openUploads: number;
  /** Stops the task: `signal` aborts with a TaskAbort, and calls on `input` and `output` reject with it. The first reason wins. */
  abort(reason?: AbortReason, message?: string): void;
  /** What `accessToken.get()` says from now on, as after a heartbeat. */
  rotateToken(token: string): void;
  /**
   * Ends the task as a node does after `run` has settled: calls on the ports fail with `failed_precondition`, open
   * streams end, materialised inputs are removed. `outputs` can still be read. Harmless when repeated.
   */
  close(): Promise<void>;
}

const TASK_ID = '00000000-0000-4000-8000-000000000001';
const JOB_ID = '00000000-0000-4000-8000-000000000002';
const DOMAIN_ID = '00000000-0000-4000-8000-00000000000d';
const CHUNK_BYTES = 64 * 1024;
const MAX_NAME_BYTES = 128;
const MAX_REL_PATH_BYTES = 1024;

/**
 * Makes a context for one attempt.
 *
 * @example
 * const ctx = createTestContext({ inputs: { photo: bytes }, task: { meta: { size: 256 } } });
 * await runner.run(ctx);
 * assert.deepEqual([...ctx.outputs.keys()], ['thumbnail.png']);
 *
 * @throws MillraceError `invalid_argument` for a lease or task no dispatcher could send, or an `inputsDir` that is not a folder.
 */
export function createTestContext(options: TestContextOptions = {}): TestContext {
  return new RecordingContext(options);
}

class RecordingContext implements TestContext {
  readonly lease: LeaseEnvelope;
  readonly input: InputSource;
  readonly output: ArtifactSink;
  readonly ctrl: ControlPlane;
  readonly accessToken: AccessTokenProvider;
  readonly log: Logger;
  readonly outputs: ReadonlyMap<string, Uint8Array>;
  readonly progressValues: Json[] = [];
  readonly events: Json[] = [];
  readonly logs: LogLine[] = [];
  readonly calls: PortCall[] = [];
  readonly lateCalls: PortCall[] = [];

  readonly #controller = new AbortController();
  readonly #closing = new AbortController();
  readonly #onCall: TestContextOptions['onCall'];
  readonly #sink: RecordingSink;
  readonly #inputs: RecordingInputs;
  #token: string;

  constructor(options: TestContextOptions) {
    const parts = collectInputs(options);
    this.lease = parseLease({
      access_token: 'test-token',
      domain_id: DOMAIN_ID,
      domain_server_url: 'http://domain.invalid',
      status: 'running',
      ...options.lease,
      task: {
        id: TASK_ID,
        job_id: JOB_ID,
        capability: '/test/v1',
        inputs_cids: [...parts.keys()],
        attempts: 1,
        max_attempts: 3,
        status: 'running',
        ...options.task,
      },
    });
    this.#token = this.lease.access_token ?? '';
    this.#onCall = options.onCall;
    const gate: Gate = {
      enter: (call) => this.#enter(call),
      signal: AbortSignal.any([this.#controller.signal, this.#closing.signal]),
    };
    const store = options.outputsDir === undefined ? new MemoryStore() : new DiskStore(options.outputsDir);
    this.outputs = store.contents;
    this.#inputs = new RecordingInputs(gate, parts, this.lease);
    this.#sink = new RecordingSink(gate, store, this.lease.task, new Set(parts.keys()));
    this.input = this.#inputs;
    this.output = this.#sink;
    this.ctrl = {
      isCancelled: async () => {
        await this.#note({ port: 'ctrl', method: 'isCancelled', target: null });
        return this.signal.aborted;
      },
      progress: async (value) => {
        const open = await this.#note({ port: 'ctrl', method: 'progress', target: null });
        if (open) this.progressValues.push(jsonCopy(value, 'ctrl.progress'));
      },
      logEvent: async (value) => {
        const open = await this.#note({ port: 'ctrl', method: 'logEvent', target: null });
        if (open) this.events.push(jsonCopy(value, 'ctrl.logEvent'));
      },
    };
    this.accessToken = { get: () => this.#token };
    this.log = this.#logger({});
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  get artifacts(): readonly ArtifactRecord[] {
    return [...this.#sink.records.values()];
  }

  get openUploads(): number {
    return this.#sink.openUploads;
  }

  abort(reason: AbortReason = 'canceled', message?: string): void {
    this.#controller.abort(new TaskAbort(reason, message));
  }

  rotateToken(token: string): void {
    this.#token = token;
  }

  async close(): Promise<void> {
    this.#closing.abort(new MillraceError('failed_precondition', 'the task has ended; its ports are closed'));
    await this.#inputs.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** The way into a call that moves bytes: refused once the task was stopped or has ended. */
  async #enter(call: PortCall): Promise<void> {
    await this.#note(call);
    this.#closing.signal.throwIfAborted();
    this.#controller.signal.throwIfAborted();
  }

  /** The way into a call that always succeeds on a node. False when it came too late to count. */
  async #note(call: PortCall): Promise<boolean> {
    if (this.#closing.signal.aborted) {
      this.lateCalls.push(call);
      return false;
    }
    this.calls.push(call);
    await this.#onCall?.(call);
    return true;
  }

  #logger(bound: JsonObject): Logger {
    const line =
      (level: LogLevel) =>
      (message: string, fields: JsonObject = {}): void => {
        const call: PortCall = { port: 'log', method: level, target: null };
        if (this.#closing.signal.aborted) {
          this.lateCalls.push(call);
          return;
        }
        this.calls.push(call);
        const all = jsonCopy({ ...bound, ...fields }, `log.${level}`);
        this.logs.push({ level, message, fields: all });
      };
    return {
      debug: line('debug'),
      info: line('info'),
      warn: line('warn'),
      error: line('error'),
      child: (fields) => this.#logger({ ...bound, ...fields }),
    };
  }
}

interface Gate {
  enter(call: PortCall): Promise<void>;
  /** Aborts when the task is stopped or has ended. */
  readonly signal: AbortSignal;
}

interface Part {
  readonly name: string;
  readonly data_type: string;
  /** Bytes, or the path of a file. */
  readonly content: Uint8Array | string;
}

function collectInputs(options: TestContextOptions): Map<string, readonly Part[]> {
  const parts = new Map<string, readonly Part[]>();
  if (options.inputsDir !== undefined) {
    const root = resolve(options.inputsDir);
    if (!statSync(root, { throwIfNoEntry: false })?.isDirectory()) {
      throw new MillraceError('invalid_argument', `inputsDir ${root} must be an existing folder`);
    }
    const files = readdirSync(root, { recursive: true, withFileTypes: true }).filter((entry) =>
      entry.isFile(),
    );
    const paths = files.map((entry) => join(entry.parentPath, entry.name));
    for (const path of paths.toSorted()) {
      const name = basename(path);
      const part: Part = { name, data_type: dataTypeOf(name), content: path };
      parts.set(relative(root, path).replaceAll(sep, '/'), [part]);
    }
  }
  for (const [cid, value] of Object.entries(options.inputs ?? {})) {
    const list: readonly TestInput[] =
      typeof value === 'string' || value instanceof Uint8Array
        ? [{ content: value }]
        : 'content' in value
          ? [value]
          : value;
    if (list.length === 0) {
      throw new MillraceError(
        'invalid_argument',
        `inputs[${JSON.stringify(cid)}] must have at least one part`,
      );
    }
    parts.set(
      cid,
      list.map(({ content, name = cid, data_type = dataTypeOf(name) }) => ({
        name,
        data_type,
        content: typeof content === 'string' ? new TextEncoder().encode(content) : Uint8Array.from(content),
      })),
    );
  }
  return parts;
}

class RecordingInputs implements InputSource {
  readonly #gate: Gate;
  readonly #parts: ReadonlyMap<string, readonly Part[]>;
  readonly #lease: LeaseEnvelope;
  #folder: Promise<string> | null = null;
  #downloads = 0;

  constructor(gate: Gate, parts: ReadonlyMap<string, readonly Part[]>, lease: LeaseEnvelope) {
    this.#gate = gate;
    this.#parts = parts;
    this.#lease = lease;
  }

  async getBytesByCid(cid: string, options?: InputReadOptions): Promise<Uint8Array> {
    const { first, signal } = await this.#begin('getBytesByCid', cid, options);
    const chunks: Uint8Array[] = [];
    for await (const chunk of readPart(first, signal)) chunks.push(chunk);
    return Uint8Array.from(Buffer.concat(chunks));
  }

  async materializeCidToTemp(cid: string, options?: InputReadOptions): Promise<string> {
    return (await this.#materialize('materializeCidToTemp', cid, options)).path;
  }

  materializeCidWithMeta(cid: string, options?: InputReadOptions): Promise<MaterializedInput> {
    return this.#materialize('materializeCidWithMeta', cid, options);
  }

  async openRead(cid: string, options?: InputReadOptions): Promise<Readable> {
    const { first, signal } = await this.#begin('openRead', cid, options);
    const stream = readPart(first, signal);
    await new Promise<void>((opened, failed) => {
      stream.once('readable', opened).once('end', opened).once('error', failed);
    });
    return stream;
  }

  async close(): Promise<void> {
    const folder = await this.#folder;
    if (folder !== null) await rm(folder, { recursive: true, force: true });
    this.#folder = null;
  }

  async #materialize(method: string, cid: string, options?: InputReadOptions): Promise<MaterializedInput> {
    const { id, all, first, signal } = await this.#begin(method, cid, options);
    this.#folder ??= mkdtemp(join(tmpdir(), 'millrace-test-'));
    this.#downloads += 1;
    const root = join(await this.#folder, `domain-input-${this.#downloads}`);
    const paths: string[] = [];
    for (const part of all) {
      const path = join(root, materializedPath(part.name, part.data_type));
      await mkdir(dirname(path), { recursive: true });
      await writeFile(path, readPart(part, signal));
      paths.push(path);
    }
    return {
      ...materializedInput(cid, paths[0]!),
      data_id: id,
      name: first.name,
      data_type: first.data_type,
      domain_id: this.#lease.domain_id,
      root_dir: root,
      related_files: paths.slice(1),
    };
  }

  async #begin(
    method: string,
    cid: string,
    options: InputReadOptions = {},
  ): Promise<{ id: string; all: readonly Part[]; first: Part; signal: AbortSignal }> {
    await this.#gate.enter({ port: 'input', method, target: cid });
    options.signal?.throwIfAborted();
    const id = this.#idOf(cid);
    const all = this.#parts.get(id);
    if (!all) {
      const known = [...this.#parts.keys()].slice(0, 8).join(', ') || 'none';
      throw new MillraceError(
        'not_found',
        `input ${JSON.stringify(cid)}: not found (404); inputs here: ${known}`,
      );
    }
    const signal = options.signal ? AbortSignal.any([this.#gate.signal, options.signal]) : this.#gate.signal;
    return { id, all, first: all[0]!, signal };
  }

  /** A CID as a node reads it: a data id, or a URL of the lease's own domain and server. */
  #idOf(cid: string): string {
    const text = cid.trim();
    if (text === '') throw new MillraceError('invalid_argument', 'input CID must not be empty');
    if (this.#parts.has(text) || !(text.includes('://') || text.startsWith('/'))) return text;
    const server = this.#lease.domain_server_url ?? 'http://domain.invalid';
    const url = URL.canParse(text, server) ? new URL(text, server) : null;
    if (!url)
      throw new MillraceError('invalid_argument', `input CID ${JSON.stringify(cid)} is not a valid URL`);
    const [, domain, id] = /domains\/([^/]+)\/data\/([^/]+)/.exec(url.pathname) ?? [];
    const queried = url.searchParams.get('ids');
    if (url.origin !== new URL(server).origin || (domain !== undefined && domain !== this.#lease.domain_id)) {
      throw new MillraceError(
        'permission_denied',
        `input CID ${JSON.stringify(cid)} must name the lease's domain server and domain`,
      );
    }
    return id ?? queried ?? text;
  }
}

/** The bytes of a part as a stream with backpressure. Destroyed with the signal's reason. */
function readPart(part: Part, signal: AbortSignal): Readable {
  const { content } = part;
  const stream =
    typeof content === 'string'
      ? createReadStream(content, { highWaterMark: CHUNK_BYTES })
      : Readable.from(chunksOf(content), { objectMode: false, highWaterMark: CHUNK_BYTES });
  const onAbort = (): void => void stream.destroy(signal.reason);
  if (signal.aborted) onAbort();
  else signal.addEventListener('abort', onAbort, { once: true });
  // Whoever reads it meets the error then; before that it must not end the process.
  stream.on('error', () => undefined);
  return stream.once('close', () => signal.removeEventListener('abort', onAbort));
}

/** Copies, so that a runner which writes into what it read does not change the input. */
function* chunksOf(bytes: Uint8Array): Generator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += CHUNK_BYTES) yield bytes.slice(at, at + CHUNK_BYTES);
}

/** Where artifacts go. A writer's bytes become visible under their path when it is committed, whole. */
interface ArtifactStore {
  readonly contents: ReadonlyMap<string, Uint8Array>;
  create(path: string): Promise<ArtifactWriter>;
}

interface ArtifactWriter {
  write(chunk: Uint8Array): Promise<void>;
  commit(): Promise<void>;
  discard(): Promise<void>;
}

class MemoryStore implements ArtifactStore {
  readonly contents = new Map<string, Uint8Array>();

  async create(path: string): Promise<ArtifactWriter> {
    let chunks: Uint8Array[] = [];
    return {
      write: async (chunk) => void chunks.push(Uint8Array.from(chunk)),
      commit: async () => void this.contents.set(path, Uint8Array.from(Buffer.concat(chunks))),
      discard: async () => {
        chunks = [];
      },
    };
  }
}

class DiskStore implements ArtifactStore {
  readonly contents: DiskContents;
  readonly #root: string;
  #created = 0;

  constructor(root: string) {
    this.#root = resolve(root);
    this.contents = new DiskContents(this.#root);
  }

  async create(path: string): Promise<ArtifactWriter> {
    const target = join(this.#root, ...path.split('/'));
    this.#created += 1;
    const partial = join(dirname(target), `.${basename(target)}.${this.#created}.partial`);
    await mkdir(dirname(target), { recursive: true });
    const file: FileHandle = await open(partial, 'wx');
    return {
      write: (chunk) => file.writeFile(chunk),
      commit: async () => {
        await file.close();
        await rename(partial, target);
        this.contents.paths.add(path);
      },
      discard: async () => {
        await file.close();
        rmSync(partial, { force: true });
      },
    };
  }
}

/** The committed artifacts of a folder as a map that reads when asked, so large ones need no memory before. */
class DiskContents implements ReadonlyMap<string, Uint8Array> {
  readonly paths = new Set<string>();
  readonly #root: string;

  constructor(root: string) {
    this.#root = root;
  }

  get size(): number {
    return this.paths.size;
  }

  has(path: string): boolean {
    return this.paths.has(path);
  }

  get(path: string): Uint8Array | undefined {
    return this.paths.has(path) ? Uint8Array.from(readFileSync(join(this.#root, path))) : undefined;
  }

  keys(): SetIterator<string> {
    return this.paths.values();
  }

  *values(): MapIterator<Uint8Array> {
    for (const [, bytes] of this) yield bytes;
  }

  entries(): MapIterator<[string, Uint8Array]> {
    return this[Symbol.iterator]();
  }

  *[Symbol.iterator](): MapIterator<[string, Uint8Array]> {
    for (const path of this.paths) yield [path, this.get(path)!];
  }

  forEach(visit: (bytes: Uint8Array, path: string, map: ReadonlyMap<string, Uint8Array>) => void): void {
    for (const [path, bytes] of this) visit(bytes, path, this);
  }
}

interface Naming {
  readonly name: string;
  readonly dataType: string;
  readonly existingId: string | null;
}

class RecordingSink implements ArtifactSink {
  readonly records = new Map<string, ArtifactRecord>();
  openUploads = 0;
  readonly #gate: Gate;
  readonly #store: ArtifactStore;
  readonly #task: TaskSpec;
  /** Every id a domain server would know: inputs and artifacts. */
  readonly #ids: Set<string>;
  #nextId = 1;

  constructor(gate: Gate, store: ArtifactStore, task: TaskSpec, inputIds: Set<string>) {
    this.#gate = gate;
    this.#store = store;
    this.#task = task;
    this.#ids = inputIds;
  }

  async putBytes(relPath: string, bytes: Uint8Array): Promise<void> {
    await this.#enter('putBytes', relPath);
    await this.#put(relPath, [checkChunk(bytes, 'putBytes')]);
  }

  async putFile(relPath: string, filePath: string): Promise<void> {
    await this.#enter('putFile', relPath);
    await this.#put(relPath, readFileStream(filePath, 'putFile'));
  }

  async putStream(relPath: string, stream: ByteStream): Promise<void> {
    await this.#enter('putStream', relPath);
    await this.#put(relPath, stream);
  }

  async openMultipart(relPath: string): Promise<MultipartUpload> {
    await this.#enter('openMultipart', relPath);
    const path = this.#logicalPath(relPath);
    const writer = await this.#store.create(path);
    let state: 'open' | 'writing' | 'finished' | 'aborted' = 'open';
    this.openUploads += 1;
    const begin = async (method: string): Promise<void> => {
      if (state === 'writing') {
        throw new MillraceError(
          'failed_precondition',
          `upload ${path}: ${method} while a writeChunk is under way`,
        );
      }
      if (state !== 'open') {
        throw new MillraceError('failed_precondition', `upload ${path}: ${method} after it was ${state}`);
      }
      if (method !== 'abort') state = 'writing';
      try {
        await this.#gate.enter({ port: 'output', method, target: relPath });
      } finally {
        if (state === 'writing') state = 'open';
      }
    };
    return {
      writeChunk: async (chunk) => {
        await begin('writeChunk');
        checkChunk(chunk, 'writeChunk');
        state = 'writing';
        try {
          await writer.write(chunk);
        } finally {
          state = 'open';
        }
      },
      finish: async () => {
        await begin('finish');
        state = 'finished';
        this.openUploads -= 1;
        await writer.commit();
        this.#record(path, this.#naming(relPath, path));
      },
      abort: async () => {
        // Cleaning up after the task was stopped is what abort is for, so it is never refused for that.
        if (!this.#gate.signal.aborted) await begin('abort');
        if (state === 'finished' || state === 'aborted') return;
        state = 'aborted';
        this.openUploads -= 1;
        await writer.discard();
      },
    };
  }

  async putDomainArtifact(request: DomainArtifactRequest): Promise<string | null> {
    await this.#enter('putDomainArtifact', request.rel_path);
    checkName(request.name, 'name');
    checkName(request.data_type, 'data_type');
    const existingId = request.existing_id ?? null;
    if (existingId !== null && !this.#ids.has(existingId)) {
      throw new MillraceError('not_found', `existing_id ${JSON.stringify(existingId)}: not found (404)`);
    }
    const { content } = request;
    const chunks =
      'bytes' in content
        ? [checkChunk(content.bytes, 'content.bytes')]
        : 'file' in content
          ? readFileStream(content.file, 'content.file')
          : content.stream;
    const naming: Naming = { name: request.name, dataType: request.data_type, existingId };
    return this.#put(request.rel_path, chunks, naming);
  }

  #enter(method: string, target: string): Promise<void> {
    return this.#gate.enter({ port: 'output', method, target });
  }

  async #put(relPath: string, chunks: Iterable<Uint8Array> | ByteStream, naming?: Naming): Promise<string> {
    const path = this.#logicalPath(relPath);
    const writer = await this.#store.create(path);
    try {
      for await (const chunk of interruptible(chunks, this.#gate.signal)) {
        await writer.write(checkChunk(chunk, 'the stream'));
      }
    } catch (error) {
      await writer.discard();
      throw error;
    }
    await writer.commit();
    return this.#record(path, naming ?? this.#naming(relPath, path));
  }

  #record(path: string, { name, dataType, existingId }: Naming): string {
    const earlier = this.records.get(path);
    const same = earlier?.name === name && earlier.data_type === dataType ? earlier.id : null;
    const id = existingId ?? same ?? `artifact-${this.#nextId++}`;
    this.#ids.add(id);
    this.records.set(path, { logical_path: path, name, data_type: dataType, id });
    return id;
  }

  #naming(relPath: string, path: string): Naming {
    return { name: artifactName(path, this.#task.id), dataType: dataTypeOf(relPath), existingId: null };
  }

  #logicalPath(relPath: string): string {
    const reject = (rule: string): never => {
      throw new MillraceError('invalid_argument', `artifact path ${JSON.stringify(relPath)} ${rule}`);
    };
    if (typeof relPath !== 'string') reject('must be a string');
    const rel = relPath.replace(/^\/+/, '');
    const whole = logicalPath(this.#task.outputs_prefix, rel);
    if (whole === '') reject('must not be empty for a task without outputs_prefix');
    // As on a node, the prefix alone is a path.
    if (rel === '') return whole;
    const bytes = Buffer.byteLength(rel);
    if (bytes > MAX_REL_PATH_BYTES) reject(`must be at most ${MAX_REL_PATH_BYTES} bytes, is ${bytes}`);
    if (/[\p{Cc}\\]/u.test(rel)) reject('must not contain control characters or backslashes');
    if (rel.split('/').some((segment) => segment === '' || segment === '.' || segment === '..')) {
      reject('must not have empty, "." or ".." segments');
    }
    return whole;
  }
}

/** The chunks until the signal aborts, then its reason, also while the source is still busy with the next one. */
async function* interruptible(
  chunks: Iterable<Uint8Array> | ByteStream,
  signal: AbortSignal,
): AsyncGenerator<Uint8Array> {
  const iterator =
    Symbol.asyncIterator in chunks ? chunks[Symbol.asyncIterator]() : chunks[Symbol.iterator]();
  let interrupt: (reason: unknown) => void = () => undefined;
  const onAbort = (): void => interrupt(signal.reason);
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    for (;;) {
      signal.throwIfAborted();
      // Not a race against one promise for the abort, which would remember every chunk's race until the end.
      const next = await new Promise<IteratorResult<Uint8Array>>((resolve, reject) => {
        interrupt = reject;
        Promise.resolve(iterator.next()).then(resolve, reject);
      });
      signal.throwIfAborted();
      if (next.done) return;
      yield next.value;
    }
  } finally {
    signal.removeEventListener('abort', onAbort);
    // Not waited for: a source that is stuck would hold up the abort.
    void Promise.resolve(iterator.return?.()).catch(() => undefined);
  }
}

function checkChunk(value: unknown, what: string): Uint8Array {
  if (value instanceof Uint8Array) return value;
  throw new MillraceError('invalid_argument', `${what} must be given Uint8Array chunks, got ${typeof value}`);
}

function checkName(value: string, member: string): void {
  const bytes = typeof value === 'string' ? new TextEncoder().encode(value).length : 0;
  if (bytes < 1 || bytes > MAX_NAME_BYTES) {
    throw new MillraceError(
      'invalid_argument',
      `${member} must be 1 to ${MAX_NAME_BYTES} bytes, got ${bytes}`,
    );
  }
}

function readFileStream(path: string, what: string): Readable {
  if (!statSync(path, { throwIfNoEntry: false })?.isFile()) {
    throw new MillraceError('not_found', `${what}: ${path} is not an existing file`);
  }
  return createReadStream(path, { highWaterMark: CHUNK_BYTES });
}

/** A copy as the wire would carry it. @throws MillraceError `invalid_argument` when it would arrive changed. */
function jsonCopy<T extends Json>(value: T, what: string): T {
  const problem = notJson(value, new Set());
  if (problem !== null)
    throw new MillraceError('invalid_argument', `${what}: the value must be JSON, got ${problem}`);
  return structuredClone(value);
}

function notJson(value: unknown, above: Set<object>): string | null {
  if (value === null || typeof value === 'string' || typeof value === 'boolean') return null;
  if (typeof value === 'number') return Number.isFinite(value) ? null : String(value);
  if (typeof value !== 'object') return typeof value;
  if (above.has(value)) return 'a cycle';
  const prototype: unknown = Object.getPrototypeOf(value);
  if (!Array.isArray(value) && prototype !== Object.prototype && prototype !== null) {
    return `a ${value.constructor.name}`;
  }
  above.add(value);
  const problem = Object.values(value)
    .map((member) => notJson(member, above))
    .find((found) => found !== null);
  above.delete(value);
  return problem ?? null;
}
