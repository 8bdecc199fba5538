/**
 * The runner's half of a task's context: a TaskContext whose ports are calls to the engine's thread.
 *
 * Calls on `input` and `output` are answered one by one; `progress`, `logEvent` and log lines are notes: sent
 * in order, not answered, at most one batch under way. A runner that tells faster than the node listens has
 * its progress values merged and, if it does not await, its events and lines beyond {@link MAX_PENDING_NOTES}
 * dropped and counted.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Readable } from 'node:stream';
import { receiveMessageOnPort } from 'node:worker_threads';
import { MillraceError, TaskAbort } from '@millrace/runner';
import type {
  ArtifactSink,
  ByteStream,
  ControlPlane,
  DomainArtifactRequest,
  InputReadOptions,
  InputSource,
  Json,
  JsonObject,
  LeaseEnvelope,
  LogLevel,
  Logger,
  MaterializedInput,
  MultipartUpload,
  TaskContext,
} from '@millrace/runner';
import { ByteStreams, checkChunk } from './byte-streams.ts';
import type { Post } from './byte-streams.ts';
import { FLAG } from './protocol.ts';
import type {
  Call,
  Note,
  ThreadPorts,
  ToEngine,
  ToThread,
  TokenAnswer,
  TokenRequest,
  WireArtifact,
} from './protocol.ts';
import { decodeError } from './wire-error.ts';

/** Events and log lines kept for sending while an earlier batch is under way. */
export const MAX_PENDING_NOTES = 1024;
/** Characters of output that may wait, whatever `logBytes` allows in all: more than its default. */
export const MAX_PENDING_OUTPUT = 4 * 1024 * 1024;
/** Calls under way at once; more wait their turn, so that a loop without `await` floods nobody. */
export const MAX_CALLS = 64;
/** The engine's thread answers in well under a millisecond unless it is busy. */
const TOKEN_WAIT_MS = 10_000;

interface PendingCall {
  resolve(value: unknown): void;
  reject(error: unknown): void;
}

/** Numbers calls over the whole life of the thread, so that an answer that comes late finds nobody. */
let lastCall = 0;

export class ThreadTask {
  readonly context: TaskContext;
  readonly task: number;
  readonly #ports: ThreadPorts;
  readonly #post: Post<ToEngine>;
  readonly #abort = new AbortController();
  readonly #streams: ByteStreams;
  readonly #calls = new Map<number, PendingCall>();
  /** Output calls not yet answered; a task is not done before they are. */
  readonly #outputs = new Set<Promise<unknown>>();
  /** Path of each upload neither finished nor aborted. */
  readonly #openUploads = new Map<number, string>();
  readonly #notes: NoteQueue;
  #slots = MAX_CALLS;
  readonly #waitingForSlot: (() => void)[] = [];
  #closed = false;

  constructor(task: number, lease: LeaseEnvelope, ports: ThreadPorts, post: Post<ToEngine>) {
    this.task = task;
    this.#ports = ports;
    this.#post = post;
    this.#streams = new ByteStreams(post);
    this.#notes = new NoteQueue((notes) => post({ t: 'notes', task, notes }));
    this.context = {
      lease,
      input: this.#inputPort(),
      output: this.#outputPort(),
      ctrl: this.#controlPort(),
      accessToken: { get: () => this.#token() },
      signal: this.#abort.signal,
      log: this.#logger({}),
    };
  }

  handle(message: ToThread): void {
    switch (message.t) {
      case 'answer':
        this.#take(message.id)?.resolve(message.value);
        return;
      case 'refusal':
        this.#take(message.id)?.reject(decodeError(message.error, { trustAborts: true }));
        return;
      case 'abort':
        this.#abort.abort(new TaskAbort(message.reason, message.message));
        return;
      case 'noted':
        this.#notes.taken();
        return;
      case 'chunk':
      case 'end':
      case 'fail':
      case 'credit':
      case 'stop':
        this.#streams.handle(message);
        return;
      case 'run':
      case 'close':
        // The thread's own business.
        return;
    }
  }

  /** Adds a line of output. It has a bound of its own, `logBytes`; dropped here is only what a larger one lets pile up. */
  addOutput(note: Note): void {
    void this.#notes.add(note, { bounded: false });
  }

  /**
   * Waits for output calls the runner did not await: an artifact it asked for is stored, or its failure is
   * seen, before the task counts as done. An upload left open is an error, for its bytes would be lost
   * without a word. A task that was aborted has its ending, and is not waited for.
   *
   * @throws MillraceError `failed_precondition`
   */
  async finishOutputs(): Promise<void> {
    const { signal } = this.#abort;
    if (this.#outputs.size === 0 && this.#openUploads.size === 0) return;
    const aborted = new Promise<void>((resolve) =>
      signal.addEventListener('abort', () => resolve(), { once: true }),
    );
    while (this.#outputs.size > 0 && !signal.aborted) {
      await Promise.race([Promise.all(this.#outputs), aborted]);
    }
    if (signal.aborted) return;
    const [path] = this.#openUploads.values();
    if (path === undefined) return;
    throw new MillraceError(
      'failed_precondition',
      `run returned with the upload ${JSON.stringify(path)} neither finished nor aborted; call finish() to store it or abort() to discard it`,
    );
  }

  /** After this every call on a port fails. What was told before is on its way. */
  close(): void {
    this.#closed = true;
    this.#notes.flush();
    this.#streams.close(ENDED);
    for (const id of this.#calls.keys()) this.#take(id)?.reject(ENDED);
    for (const start of this.#waitingForSlot.splice(0)) start();
  }

  #inputPort(): InputSource {
    return {
      getBytesByCid: (cid, options) =>
        this.#read({ method: 'getBytesByCid', cid }, options) as Promise<Uint8Array>,
      materializeCidToTemp: (cid, options) =>
        this.#read({ method: 'materializeCidToTemp', cid }, options) as Promise<string>,
      materializeCidWithMeta: (cid, options) =>
        this.#read({ method: 'materializeCidWithMeta', cid }, options) as Promise<MaterializedInput>,
      openRead: (cid, options) => this.#openRead(cid, options),
    };
  }

  #outputPort(): ArtifactSink {
    return {
      putBytes: (path, bytes) =>
        this.#output(async () => {
          await this.#sendBytes(bytes, (copy) => ({ method: 'putBytes', path, bytes: copy }));
        }),
      putFile: (path, file) =>
        this.#output(async () => {
          await this.#limited(() => this.#call({ method: 'putFile', path, file }));
        }),
      putStream: (path, stream) =>
        this.#output(async () => {
          await this.#sendStream({ method: 'putStream', path }, stream);
        }),
      openMultipart: (path) => this.#output(() => this.#openMultipart(path)),
      putDomainArtifact: (request) =>
        this.#output(async () => (await this.#putDomainArtifact(request)) as string | null),
    };
  }

  async #putDomainArtifact(request: DomainArtifactRequest): Promise<unknown> {
    const { rel_path, name, data_type, existing_id = null, content } = request;
    const call = (wire: WireArtifact['content']): Call => ({
      method: 'putDomainArtifact',
      artifact: { rel_path, name, data_type, existing_id, content: wire },
    });
    if ('stream' in content) return await this.#sendStream(call({ stream: true }), content.stream);
    if ('file' in content) return await this.#limited(() => this.#call(call({ file: content.file })));
    return await this.#sendBytes(content.bytes, (bytes) => call({ bytes }));
  }

  #controlPort(): ControlPlane {
    const { flags } = this.#ports;
    return {
      isCancelled: async () => {
        // Read from shared memory, so that a loop which never waits for anything but this still learns of it.
        // The reason follows by message, hence the turn of the event loop.
        const aborted = (): boolean => Atomics.load(flags, FLAG.abortedTask) === this.task;
        while (aborted() && !this.#abort.signal.aborted && !this.#closed) await nextTurn();
        return this.#abort.signal.aborted;
      },
      progress: async (value) => {
        if (!this.#closed) await this.#notes.add({ kind: 'progress', value: json(value, 'ctrl.progress') });
      },
      logEvent: async (value) => {
        if (!this.#closed) await this.#notes.add({ kind: 'event', value: json(value, 'ctrl.logEvent') });
      },
    };
  }

  #logger(bound: JsonObject): Logger {
    const at =
      (level: LogLevel) =>
      (message: string, fields: JsonObject = {}): void => {
        if (this.#closed) return;
        void this.#notes.add({
          kind: 'log',
          level,
          message,
          fields: lenient(bound, fields),
        });
      };
    return {
      debug: at('debug'),
      info: at('info'),
      warn: at('warn'),
      error: at('error'),
      child: (fields) => this.#logger({ ...bound, ...fields }),
    };
  }

  /**
   * Asks the engine's thread and blocks for the answer, because `get` is synchronous and a token pushed
   * beforehand could be one rotation too old.
   */
  #token(): string {
    if (this.#closed) throw portsClosed();
    const { token, flags } = this.#ports;
    const seen = Atomics.load(flags, FLAG.tokenAnswers);
    // An answer that came too late for an earlier call must not be taken for this one's.
    while (receiveMessageOnPort(token)) continue;
    const request: TokenRequest = { task: this.task };
    token.postMessage(request, []);
    const end = performance.now() + TOKEN_WAIT_MS;
    // The wake-up for an earlier answer may come only now, so the counter decides.
    while (Atomics.load(flags, FLAG.tokenAnswers) === seen) {
      const leftMs = end - performance.now();
      if (leftMs <= 0) break;
      Atomics.wait(flags, FLAG.tokenAnswers, seen, leftMs);
    }
    const answer = receiveMessageOnPort(token)?.message as TokenAnswer | undefined;
    if (answer === undefined) {
      throw new MillraceError(
        'unavailable',
        `accessToken.get(): the node did not answer within ${TOKEN_WAIT_MS} ms`,
      );
    }
    if ('error' in answer) throw decodeError(answer.error);
    return answer.token;
  }

  async #read(call: Call, { signal }: InputReadOptions = {}): Promise<unknown> {
    return await this.#limited(() => this.#call(call, signal));
  }

  async #openRead(cid: string, { signal }: InputReadOptions = {}): Promise<Readable> {
    return await this.#limited(async () => {
      const id = ++lastCall;
      const stream = this.#streams.receive(id);
      try {
        await this.#callAs(id, { method: 'openRead', cid }, signal);
      } catch (error) {
        stream.destroy();
        throw error;
      }
      if (signal) {
        const onAbort = (): void => void stream.destroy(asError(signal.reason));
        signal.addEventListener('abort', onAbort, { once: true });
        stream.once('close', () => signal.removeEventListener('abort', onAbort));
      }
      return stream;
    });
  }

  async #sendBytes(value: Uint8Array, call: (bytes: Uint8Array) => Call): Promise<unknown> {
    checkChunk(value);
    // A copy, taken now: the caller may go on using its memory, and the copy can be transferred.
    const bytes = new Uint8Array(value);
    return await this.#limited(() => this.#call(call(bytes), undefined, [bytes.buffer]));
  }

  /**
   * Not limited in number: what a stream yields may itself depend on other calls, which then could not start.
   */
  async #sendStream(call: Call, source: ByteStream): Promise<unknown> {
    if (this.#closed) throw portsClosed();
    const id = ++lastCall;
    const failures: unknown[] = [];
    const answer = this.#callAs(id, call);
    void this.#streams.send(id, source).catch((error: unknown) => failures.push(error));
    try {
      return await answer;
    } catch (error) {
      // What the runner's own source threw says more than that the upload broke off.
      throw failures.length > 0 ? failures[0] : error;
    } finally {
      this.#streams.stopSending(id);
    }
  }

  async #openMultipart(path: string): Promise<MultipartUpload> {
    const upload = ++lastCall;
    await this.#limited(() => this.#callAs(upload, { method: 'openMultipart', path }));
    this.#openUploads.set(upload, path);
    const end = async (method: 'finish' | 'abort'): Promise<void> => {
      await this.#limited(() => this.#call({ method, upload }));
      this.#openUploads.delete(upload);
    };
    return {
      writeChunk: (chunk) =>
        this.#output(async () => {
          await this.#sendBytes(chunk, (bytes) => ({ method: 'writeChunk', upload, bytes }));
        }),
      finish: () => this.#output(() => end('finish')),
      abort: () => this.#output(() => end('abort')),
    };
  }

  /**
   * An output call that is waited for before the task counts as done. Starts at once, so bytes are copied as
   * they are now.
   */
  async #output<T>(start: () => Promise<T>): Promise<T> {
    let over: () => void = () => undefined;
    const pending = new Promise<void>((resolve) => (over = resolve));
    this.#outputs.add(pending);
    try {
      return await start();
    } finally {
      this.#outputs.delete(pending);
      over();
    }
  }

  async #limited<T>(start: () => Promise<T>): Promise<T> {
    if (this.#slots === 0 && !this.#closed) {
      await new Promise<void>((resolve) => this.#waitingForSlot.push(resolve));
    } else {
      this.#slots -= 1;
    }
    try {
      return await start();
    } finally {
      const next = this.#waitingForSlot.shift();
      if (next) next();
      else this.#slots += 1;
    }
  }

  #call(call: Call, signal?: AbortSignal, transfer?: readonly ArrayBuffer[]): Promise<unknown> {
    return this.#callAs(++lastCall, call, signal, transfer);
  }

  #callAs(id: number, call: Call, signal?: AbortSignal, transfer?: readonly ArrayBuffer[]): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#closed) throw portsClosed();
      signal?.throwIfAborted();
      const onAbort = (): void => {
        this.#post({ t: 'cancel', id });
        this.#take(id)?.reject(signal?.reason);
      };
      const release = (): void => signal?.removeEventListener('abort', onAbort);
      try {
        this.#post({ t: 'call', task: this.task, id, call }, transfer);
      } catch (cause) {
        const message = `${call.method}: an argument cannot be sent to the node; pass strings and bytes`;
        throw new MillraceError('invalid_argument', message, { cause });
      }
      signal?.addEventListener('abort', onAbort, { once: true });
      this.#calls.set(id, {
        resolve: (value) => {
          release();
          resolve(value);
        },
        reject: (error) => {
          release();
          reject(error);
        },
      });
    });
  }

  #take(id: number): PendingCall | undefined {
    const call = this.#calls.get(id);
    this.#calls.delete(id);
    return call;
  }
}

/** Notes on their way, at most one batch unacknowledged. */
export class NoteQueue {
  readonly #send: (notes: readonly Note[]) => void;
  #underWay = false;
  #pending: Note[] = [];
  /** How many of them count against the bound. */
  #bounded = 0;
  /** Characters of output among them. */
  #outputChars = 0;
  /** Where in them the newest progress value is. */
  #progressAt: number | null = null;
  /** Resolved when what is pending has been sent. */
  #sent: { readonly promise: Promise<void>; readonly resolve: () => void } | null = null;
  #dropped = 0;

  constructor(send: (notes: readonly Note[]) => void) {
    this.#send = send;
  }

  /** Resolves once the note was sent, merged into a newer one, or dropped. */
  add(note: Note, { bounded = true } = {}): Promise<void> {
    if (!this.#underWay) {
      this.#underWay = true;
      this.#send([note]);
      return Promise.resolve();
    }
    if (note.kind === 'progress') {
      if (this.#progressAt !== null) this.#pending.splice(this.#progressAt, 1);
      this.#progressAt = this.#pending.length;
    } else if (!bounded) {
      if (this.#outputChars >= MAX_PENDING_OUTPUT) {
        this.#dropped += 1;
        return this.#whenSent();
      }
      if (note.kind === 'log') this.#outputChars += note.message.length;
    } else {
      if (this.#bounded >= MAX_PENDING_NOTES) {
        this.#dropped += 1;
        return this.#whenSent();
      }
      this.#bounded += 1;
    }
    this.#pending.push(note);
    return this.#whenSent();
  }

  /** The batch under way was taken in by the engine. */
  taken(): void {
    this.#underWay = false;
    if (this.#pending.length > 0) this.flush();
  }

  /** Sends what is pending now, whatever is under way. */
  flush(): void {
    const notes = this.#pending;
    this.#pending = [];
    this.#bounded = 0;
    this.#outputChars = 0;
    this.#progressAt = null;
    if (this.#dropped > 0) {
      notes.push({
        kind: 'log',
        level: 'warn',
        message: 'events and log lines were dropped: the task told them faster than they were taken',
        fields: { dropped: this.#dropped },
      });
      this.#dropped = 0;
    }
    if (notes.length > 0) {
      this.#underWay = true;
      this.#send(notes);
    }
    this.#sent?.resolve();
    this.#sent = null;
  }

  #whenSent(): Promise<void> {
    if (this.#sent === null) {
      let resolve: () => void = () => undefined;
      const promise = new Promise<void>((done) => (resolve = done));
      this.#sent = { promise, resolve };
    }
    return this.#sent.promise;
  }
}

/** For all that a task left under way: most leave nothing, and making an error costs more than ending a short task. */
const ENDED = portsClosed();

function portsClosed(): MillraceError {
  return new MillraceError('failed_precondition', 'the task has ended; its ports are closed');
}

/** @throws MillraceError `invalid_argument` for what cannot be sent as JSON. */
function json<T extends Json>(value: T, what: string): T {
  let text: string | undefined;
  try {
    text = JSON.stringify(value);
  } catch (cause) {
    throw new MillraceError('invalid_argument', `${what}: the value must be JSON`, { cause });
  }
  if (text === undefined) {
    throw new MillraceError('invalid_argument', `${what}: the value must be JSON, got ${typeof value}`);
  }
  return JSON.parse(text) as T;
}

/** A log line is never worth an exception: fields that are not JSON are left out and said to be. */
function lenient(bound: JsonObject, fields: JsonObject): JsonObject {
  try {
    return json({ ...bound, ...fields }, 'fields');
  } catch {
    return { ...bound, fields_dropped: 'not JSON' };
  }
}

function asError(value: unknown): Error {
  return value instanceof Error ? value : new MillraceError('canceled', String(value));
}
