/**
 * The engine's half of a task's context: performs what the runner's thread asks for on the node's own ports,
 * and hands back answers and streams. It lives exactly as long as one `run`.
 *
 * Nothing here trusts the other side to be quick, or to stop asking.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { MillraceError, TaskAbort } from '@millrace/runner';
import type {
  DomainArtifactRequest,
  Logger,
  MaterializedInput,
  MultipartUpload,
  TaskContext,
} from '@millrace/runner';
import { ByteStreams } from './byte-streams.ts';
import type { Post } from './byte-streams.ts';
import type { Call, Note, ToEngine, ToThread, WireArtifact } from './protocol.ts';
import { encodeError } from './wire-error.ts';

const NOTES_PER_TURN = 128;

/** One for all, since making an error costs more than ending a short task otherwise does. */
const ENDED = new MillraceError('failed_precondition', 'the task has ended; its ports are closed');

type Answer = Uint8Array | string | MaterializedInput | null;

export class ContextHost {
  readonly #ctx: TaskContext;
  readonly #post: Post<ToThread>;
  readonly #log: Logger | undefined;
  readonly #task: number;
  readonly #streams: ByteStreams;
  readonly #calls = new Map<number, AbortController>();
  readonly #uploads = new Map<number, MultipartUpload>();
  /** Notes are handed on one after the other, so their order is kept whatever the node does with each. */
  #notes: Promise<void> = Promise.resolve();
  #closed = false;

  constructor(ctx: TaskContext, task: number, post: Post<ToThread>, log: Logger | undefined) {
    this.#ctx = ctx;
    this.#task = task;
    this.#post = post;
    this.#log = log;
    this.#streams = new ByteStreams(post);
  }

  handle(message: ToEngine): void {
    switch (message.t) {
      case 'call':
        void this.#answer(message.id, message.call);
        return;
      case 'cancel':
        this.#calls
          .get(message.id)
          ?.abort(new MillraceError('canceled', 'the runner no longer wants the answer to this call'));
        this.#streams.stopSending(message.id);
        return;
      case 'notes':
        this.#notes = this.#notes.then(() => this.#takeNotes(message.notes));
        return;
      case 'chunk':
      case 'end':
      case 'fail':
      case 'credit':
      case 'stop':
        this.#streams.handle(message);
        return;
      case 'loaded':
      case 'load-failed':
      case 'settled':
      case 'stray':
      case 'closed':
        // The thread's own business.
        return;
    }
  }

  /**
   * Ends what the task left under way: streams fail, uploads that were neither finished nor aborted are
   * aborted, calls are told that nobody waits for them. Resolves when everything the task had to say has been
   * handed on.
   */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#streams.close(ENDED);
    for (const call of this.#calls.values()) call.abort(ENDED);
    const uploads = [...this.#uploads.values()];
    this.#uploads.clear();
    await Promise.all([this.#notes, ...uploads.map((upload) => this.#discard(upload))]);
  }

  async #discard(upload: MultipartUpload): Promise<void> {
    try {
      await upload.abort();
    } catch (error) {
      // The upload was never committed, so nothing of it can be seen; the node sweeps what is left.
      this.#log?.debug('could not abort an unfinished upload', { error: encodeError(error).message });
    }
  }

  async #answer(id: number, call: Call): Promise<void> {
    const controller = new AbortController();
    this.#calls.set(id, controller);
    try {
      const value = await this.#perform(id, call, controller.signal);
      if (this.#closed) return;
      if (value instanceof Uint8Array) {
        const bytes = new Uint8Array(value);
        this.#post({ t: 'answer', id, value: bytes }, [bytes.buffer]);
      } else {
        this.#post({ t: 'answer', id, value });
      }
    } catch (error) {
      if (!this.#closed) this.#post({ t: 'refusal', id, error: encodeError(error) });
    } finally {
      this.#calls.delete(id);
    }
  }

  async #perform(id: number, call: Call, signal: AbortSignal): Promise<Answer> {
    const { input, output } = this.#ctx;
    switch (call.method) {
      case 'getBytesByCid':
        return await input.getBytesByCid(call.cid, { signal });
      case 'materializeCidToTemp':
        return await input.materializeCidToTemp(call.cid, { signal });
      case 'materializeCidWithMeta':
        return await input.materializeCidWithMeta(call.cid, { signal });
      case 'openRead':
        return await this.#openRead(id, call.cid, signal);
      case 'putBytes':
        await output.putBytes(call.path, call.bytes);
        break;
      case 'putFile':
        await output.putFile(call.path, call.file);
        break;
      case 'putStream':
        await this.#receiving(id, (stream) => output.putStream(call.path, stream));
        break;
      case 'openMultipart': {
        const upload = await output.openMultipart(call.path);
        // It opened too late to be used, so it is ended here.
        if (this.#closed) await this.#discard(upload);
        else this.#uploads.set(id, upload);
        break;
      }
      case 'writeChunk':
        await this.#upload(call.upload).writeChunk(call.bytes);
        break;
      case 'finish':
        await this.#upload(call.upload).finish();
        this.#uploads.delete(call.upload);
        break;
      case 'abort':
        await this.#upload(call.upload).abort();
        this.#uploads.delete(call.upload);
        break;
      case 'putDomainArtifact':
        return await this.#putDomainArtifact(id, call.artifact);
    }
    return null;
  }

  /**
   * Answers once the stream is open; the bytes follow as the runner reads them, and a failure reaches it as
   * the stream's.
   */
  async #openRead(id: number, cid: string, signal: AbortSignal): Promise<null> {
    const source = await this.#ctx.input.openRead(cid, { signal });
    if (signal.aborted) {
      source.destroy();
      throw signal.reason;
    }
    void this.#streams.send(id, source).catch(() => undefined);
    return null;
  }

  async #receiving<T>(id: number, use: (stream: AsyncIterable<Uint8Array>) => Promise<T>): Promise<T> {
    const stream = this.#streams.receive(id);
    try {
      return await use(stream);
    } finally {
      // Whoever took only a part of it, or failed, wants no more.
      stream.destroy();
    }
  }

  async #putDomainArtifact(id: number, artifact: WireArtifact): Promise<string | null> {
    const put = (content: DomainArtifactRequest['content']): Promise<string | null> =>
      this.#ctx.output.putDomainArtifact({ ...artifact, content });
    return 'stream' in artifact.content
      ? await this.#receiving(id, (stream) => put({ stream }))
      : await put(artifact.content);
  }

  #upload(id: number): MultipartUpload {
    const upload = this.#uploads.get(id);
    if (upload) return upload;
    throw new MillraceError('failed_precondition', 'this upload was finished or aborted before');
  }

  async #takeNotes(notes: readonly Note[]): Promise<void> {
    for (const [at, note] of notes.entries()) {
      // A large batch must not keep the engine's thread from its leases.
      if (at % NOTES_PER_TURN === NOTES_PER_TURN - 1) await nextTurn();
      try {
        await this.#takeNote(note);
      } catch (error) {
        // Notes have nobody to answer to; a node that takes no more of them does not fail the work.
        this.#log?.debug('a note of the task was not taken', {
          kind: note.kind,
          error: encodeError(error).message,
        });
      }
    }
    if (!this.#closed) this.#post({ t: 'noted', task: this.#task });
  }

  async #takeNote(note: Note): Promise<void> {
    switch (note.kind) {
      case 'progress':
        return await this.#ctx.ctrl.progress(note.value);
      case 'event':
        return await this.#ctx.ctrl.logEvent(note.value);
      case 'log':
        return this.#ctx.log[note.level](note.message, note.fields);
    }
  }
}

/** The TaskAbort in a signal's reason; a plain `abort()` counts as cancelled. */
export function abortOf(signal: AbortSignal): TaskAbort {
  const reason: unknown = signal.reason;
  return TaskAbort.is(reason) ? reason : new TaskAbort('canceled', encodeError(reason).message);
}
