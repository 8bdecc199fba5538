/** The artifact port: names artifacts, uploads them, and keeps the record of them that complete and fail report. */
import {
  MillraceError,
  type ArtifactSink,
  type ByteStream,
  type DomainArtifactRequest,
  type MultipartUpload,
} from '@millrace/runner';
import { checkDataName, untilAborted, type ArtifactReport } from '@millrace/dispatch/client';
import { artifactName, dataTypeOf, logicalPath } from './names.ts';
import { StreamUpload, uploadBytes, uploadFile, type Item } from './uploads.ts';
import type { PortsWorld } from './world.ts';

export interface OutputsTask {
  readonly id: string;
  readonly outputsPrefix: string | null;
}

interface Target extends Item {
  readonly path: string;
}

export class Outputs implements ArtifactSink {
  readonly #world: PortsWorld;
  readonly #task: OutputsTask;
  /** By logical path. */
  readonly #records = new Map<string, ArtifactReport>();
  /** Generated name to the logical path that has it: different paths may sanitise to one name. */
  readonly #names = new Map<string, string>();
  /** Per logical path: the last upload, which the next one waits for. */
  readonly #queues = new Map<string, Promise<void>>();

  constructor(world: PortsWorld, task: OutputsTask) {
    this.#world = world;
    this.#task = task;
  }

  /** What was uploaded, one record per logical path, in the order of their first uploads. */
  records(): ArtifactReport[] {
    return [...this.#records.values()];
  }

  async putBytes(relPath: string, bytes: Uint8Array): Promise<void> {
    await this.#put('putBytes', this.#named(relPath), (item, signal) =>
      uploadBytes(this.#world, item, bytes, signal),
    );
  }

  async putFile(relPath: string, filePath: string): Promise<void> {
    await this.#put('putFile', this.#named(relPath), (item, signal) =>
      uploadFile(this.#world, item, filePath, signal),
    );
  }

  async putStream(relPath: string, stream: ByteStream): Promise<void> {
    await this.#put('putStream', this.#named(relPath), (item, signal) =>
      this.#uploadStream(item, stream, signal),
    );
  }

  async putDomainArtifact(request: DomainArtifactRequest): Promise<string | null> {
    const target: Target = {
      path: logicalPath(this.#task.outputsPrefix, request.rel_path),
      name: checkDataName(request.name, 'name'),
      dataType: checkDataName(request.data_type, 'data_type'),
      existingId: request.existing_id ?? null,
    };
    const { content } = request;
    return this.#put('putDomainArtifact', target, (item, signal) => {
      if ('bytes' in content) return uploadBytes(this.#world, item, content.bytes, signal);
      if ('file' in content) return uploadFile(this.#world, item, content.file, signal);
      return this.#uploadStream(item, content.stream, signal);
    });
  }

  async openMultipart(relPath: string): Promise<MultipartUpload> {
    const target = this.#named(relPath);
    // It is under way until it is ended, by the runner or by the end of the task.
    const stay = this.#world.enter('openMultipart');
    const upload = new StreamUpload(this.#world, this.#itemOf(target), stay.signal);
    let state: 'open' | 'finished' | 'aborted' = 'open';
    const end = async (): Promise<void> => {
      stay.signal.removeEventListener('abort', onAbort);
      await upload.abort(stay.signal.reason);
      stay.leave();
    };
    const onAbort = (): void => {
      state = 'aborted';
      void end();
    };
    stay.signal.addEventListener('abort', onAbort, { once: true });
    const check = (what: string): void => {
      stay.signal.throwIfAborted();
      if (state !== 'open') {
        throw new MillraceError(
          'failed_precondition',
          `${what}: the upload of ${relPath} is ${state} already`,
        );
      }
    };
    return {
      writeChunk: async (chunk) => {
        check('writeChunk');
        await upload.write(chunk);
      },
      finish: async () => {
        check('finish');
        state = 'finished';
        stay.signal.removeEventListener('abort', onAbort);
        try {
          await this.#inTurn(target.path, async () => this.#record(target, await upload.finish()));
        } catch (error) {
          await upload.abort(error);
          throw error;
        } finally {
          stay.leave();
        }
      },
      abort: async () => {
        if (state !== 'open') return;
        state = 'aborted';
        await end();
      },
    };
  }

  #named(relPath: string): Target {
    const path = logicalPath(this.#task.outputsPrefix, relPath);
    let name = artifactName(path, this.#task.id);
    const holder = this.#names.get(name);
    if (holder !== undefined && holder !== path) name = artifactName(path, this.#task.id, true);
    this.#names.set(name, path);
    return { path, name, dataType: dataTypeOf(relPath), existingId: null };
  }

  async #put(
    method: string,
    target: Target,
    upload: (item: Item, signal: AbortSignal) => Promise<string | null>,
  ): Promise<string | null> {
    return this.#world.run(method, undefined, (signal) =>
      this.#inTurn(target.path, async () => {
        signal.throwIfAborted();
        return this.#record(target, await upload(this.#itemOf(target), signal));
      }),
    );
  }

  /** With the id of what this task uploaded to the path before, if it was of the same name and type. */
  #itemOf(target: Target): Item {
    const { path, name, dataType } = target;
    const before = this.#records.get(path);
    const known = before?.name === name && before.data_type === dataType ? before.id : null;
    return { name, dataType, existingId: target.existingId ?? known };
  }

  #record({ path, name, dataType }: Target, id: string | null): string | null {
    this.#records.set(path, { logical_path: path, name, data_type: dataType, id });
    return id;
  }

  async #uploadStream(item: Item, stream: ByteStream, signal: AbortSignal): Promise<string | null> {
    const upload = new StreamUpload(this.#world, item, signal);
    try {
      for await (const chunk of untilAborted(stream, signal)) await upload.write(chunk);
      return await upload.finish();
    } catch (error) {
      await upload.abort(error);
      throw error;
    }
  }

  /** After the uploads to the same path that came before. */
  async #inTurn<T>(path: string, upload: () => Promise<T>): Promise<T> {
    const before = this.#queues.get(path) ?? Promise.resolve();
    const mine = before.then(upload);
    const settled = mine.then(
      () => {},
      () => {},
    );
    this.#queues.set(path, settled);
    try {
      return await mine;
    } finally {
      if (this.#queues.get(path) === settled) this.#queues.delete(path);
    }
  }
}
