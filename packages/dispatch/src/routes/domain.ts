/**
 * Domain storage over HTTP (posemesh protocol, section 4): items are named records over bytes. Downloads as multipart,
 * JSON or raw bytes; uploads in one request or in parts. Errors are plain text, as the service has them.
 *
 * Invariants:
 * - Bodies are streams both ways; memory does not grow with an item's size.
 * - Bytes of small items go with their name into a store that keeps them (`Store.small`): one commit makes both durable.
 * - Nothing is named before its bytes are durable, and nothing of a refused request is named. Bytes that were stored
 *   but not named are the collector's (`blobs/collect.ts`), which leaves alone what was put in the last hour; an
 *   upload in one request is therefore cut off well before that.
 * - A token of a lease writes only while the lease is its task's newest (the store judges that), does not delete, and
 *   when its task has an outputs prefix replaces only what its own job created. Reads are free within the domain.
 */
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import type { Readable } from 'node:stream';
import { MillraceError, type ByteStream } from '@millrace/runner';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { z } from 'zod';
import type { Access, DomainAccess } from '../auth.ts';
import { UPLOAD_TTL_MS } from '../blobs/collect.ts';
import { checkDataName } from '../data-names.ts';
import { textErrorHandler } from '../errors-http.ts';
import { LruMap } from '../lru.ts';
import {
  downloadPartHead,
  downloadTail,
  readUpload,
  uploadBoundary,
  type MultipartPart,
} from '../multipart.ts';
import { readableFrom } from '../pull-stream.ts';
import type { DataRecord } from '../records.ts';
import type { DataWrite, UploadRecord } from '../store.ts';
import { headerOf, requireUuid, type ServerContext } from './context.ts';
import {
  DIRECT_FROM_BYTES,
  DIRECT_WHOLE_BYTES,
  directPartsBody,
  directPuts,
  partBytes,
  sha256Hex,
  withDirectParts,
} from './direct-uploads.ts';
import { byteRange, matchesEtag } from './ranges.ts';
import { answerEarly, contentLength, shortBody, tooLarge, withBody } from './raw-body.ts';

/** Ids in one download. */
const MAX_IDS = 1000;

/** Items in one list. */
const MAX_LIST = 100_000;

/** Uploads completed lately, so that a client that lost the answer can ask again. */
const COMPLETED_UPLOADS = 10_000;

/** A client that is sent to the bucket begins to read there within this. */
const DIRECT_URL_SECS = 300;

/** Small items of one request whose bytes are held in memory, in all. As much as a JSON body may have. */
const HELD_BYTES = 2 * 1024 * 1024;
/** Damaged blobs remembered; each is read once more than others. */
const DOUBTFUL_KEPT = 1024;

/** A body this short is read whole before it is looked at. Longer than a small item and what surrounds it. */
const SHORT_BODY_BYTES = 128 * 1024;

/** A read that finds the bytes gone looks once more for what the record names now. */
const READ_TRIES = 2;

const startUploadBody = z.object({
  name: z.string(),
  data_type: z.string(),
  size: z.number().int().nonnegative().nullish(),
  content_type: z.string().nullish(),
  existing_id: z.string().nullish(),
  sha256: sha256Hex.nullish(),
});

const finishUploadBody = z.object({
  parts: z.array(z.object({ part_number: z.number().int().positive(), etag: z.string() })),
});

/** Mounts `/api/v1/info` and `/api/v1/domains/{D}/data…` in a scope of their own. */
export function registerDomainRoutes(app: FastifyInstance, ctx: ServerContext): void {
  // `register` only fails when the plugin does, and then fails `ready()`; nothing is to be awaited here.
  void app.register((scope, _options, done) => {
    const routes = new DomainRoutes(ctx);
    scope.removeAllContentTypeParsers();
    // Bodies are read by the handlers, as streams with bounds of their own.
    scope.addContentTypeParser('*', (_request, payload, parsed) => parsed(null, payload));
    const textError = textErrorHandler(ctx.log);
    scope.setErrorHandler((error, request, reply) => {
      answerEarly(request, reply, ctx);
      if (MillraceError.is(error) && error.code === 'resource_exhausted' && 'errno' in error.details) {
        ctx.log.error('no space for blobs', { request_id: request.id, error: error.message });
        void reply.code(507).type('text/plain; charset=utf-8').send(error.message);
        return;
      }
      textError(error, request, reply);
    });
    const { direct } = ctx.blobs;
    if (direct !== undefined) {
      // Where a client that asks for it (`millrace-direct: 1`) may be sent for bytes. It goes nowhere else.
      scope.addHook('onRequest', async (_request, reply) => {
        void reply.header('millrace-direct-origin', direct.origin);
        // It may also ask where to put the parts of an upload: `POST …/multipart/direct`.
        if (ctx.blobs.directParts !== undefined) void reply.header('millrace-direct-parts', '1');
      });
    }
    const data = '/api/v1/domains/:domainId/data';
    scope.get('/api/v1/info', () => routes.info());
    scope.get(data, { exposeHeadRoute: false }, (request, reply) => routes.list(request, reply));
    // What the reference node asks for when it combines ids with a filter: `…/data&ids=a,b?name=n`.
    scope.get('/api/v1/domains/:domainId/data&ids=*', { exposeHeadRoute: false }, (request, reply) =>
      routes.list(request, reply),
    );
    scope.post(data, (request, reply) => routes.upload(request, reply));
    scope.put(data, (request, reply) => routes.upload(request, reply));
    scope.post(`${data}/multipart`, (request, reply) => routes.startOrFinish(request, reply));
    scope.post(`${data}/multipart/direct`, (request, reply) => routes.directParts(request, reply));
    scope.put(`${data}/multipart`, (request, reply) => routes.part(request, reply));
    scope.delete(`${data}/multipart`, (request, reply) => routes.abort(request, reply));
    scope.get(`${data}/:dataId`, { exposeHeadRoute: false }, (request, reply) => routes.item(request, reply));
    scope.delete(`${data}/:dataId`, (request, reply) => routes.remove(request, reply));
    done();
  });
}

class DomainRoutes {
  readonly #ctx: ServerContext;
  /** Upload id to data id. */
  /** Digests whose bytes were found damaged. */
  readonly #doubtful = new LruMap<string, true>(DOUBTFUL_KEPT);
  readonly #completed = new LruMap<string, { readonly domainId: string; readonly dataId: string }>(
    COMPLETED_UPLOADS,
  );

  constructor(ctx: ServerContext) {
    this.#ctx = ctx;
  }

  info(): unknown {
    const { limits } = this.#ctx;
    return {
      upload: {
        request_max_bytes: limits.uploadRequestBytes,
        domain_data_max_bytes: limits.dataBytes,
        unique_names: true,
        multipart: {
          enabled: true,
          part_size_bytes: limits.partBytes,
          ...(this.#ctx.blobs.directParts !== undefined && {
            direct: { from_bytes: DIRECT_FROM_BYTES, whole_bytes: DIRECT_WHOLE_BYTES },
          }),
        },
      },
    };
  }

  /** `GET …/data`: the items as JSON, or with their bytes as multipart. */
  async list(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { domainId } = await this.#authorize(request, 'read');
    const query = request.query as RawQuery;
    const inPath = (request.params as { '*'?: string })['*'];
    const ids = [...values(inPath), ...values(query['ids'])]
      .flatMap((text) => text.split(','))
      .map((text) => text.trim())
      .filter((text) => text !== '')
      .map((text) => requireUuid(text, 'ids'));
    if (ids.length > MAX_IDS) {
      throw new MillraceError('resource_exhausted', `at most ${MAX_IDS} ids at once, got ${ids.length}`);
    }
    const records = await this.#ctx.store.findData({
      domainId,
      ids,
      name: values(query['name'])[0] ?? null,
      dataType: values(query['data_type'])[0] ?? null,
      limit: MAX_LIST,
    });
    if (!(headerOf(request, 'accept') ?? '').includes('multipart/form-data')) {
      return reply.send({ data: records });
    }
    const found = new Set(records.map((record) => record.id));
    const missing = ids.find((id) => !found.has(id));
    // With a filter beside the ids, an id it leaves out is not missing.
    if (
      records.length === 0 ||
      (missing !== undefined && query['name'] === undefined && query['data_type'] === undefined)
    ) {
      throw new MillraceError('not_found', `no data item ${missing ?? 'of that kind'} in domain ${domainId}`);
    }
    return this.#sendMultipart(reply, records);
  }

  /** `POST` and `PUT …/data`: items whole, in one multipart body. */
  async upload(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { domainId, access } = await this.#authorize(request, 'write');
    const { limits, store } = this.#ctx;
    const boundary = uploadBoundary(headerOf(request, 'content-type'));
    const announced = contentLength(request);
    if (announced !== null && announced > limits.uploadRequestBytes) {
      throw tooLarge('the request body', limits.uploadRequestBytes, 'uploadRequestBytes');
    }
    const bounds = { limit: limits.uploadRequestBytes, name: 'uploadRequestBytes', deadline: true };
    const writes: DataWrite[] = [];
    let room = HELD_BYTES;
    const take = async (body: ByteStream, signal?: AbortSignal): Promise<void> => {
      for await (const part of readUpload(body, boundary)) {
        const target = uploadTarget(part, request.method === 'PUT');
        const stored = await this.#store(part, room, signal);
        room -= stored.bytes?.length ?? 0;
        writes.push({
          ...target,
          ...stored,
          domainId,
          lease: access.lease,
          ownOnly: confined(access),
          replaceByName: false,
        });
      }
    };
    if (announced !== null && announced <= SHORT_BODY_BYTES) await take(once(await shortBody(request)));
    else await withBody(this.#ctx, request, reply, bounds, take);
    // Only now, and all at once: what is bad or refused in the last part changes nothing.
    return reply.send({ data: await store.putData(writes) });
  }

  /**
   * Small bytes are held, to be written with their name. Others go into the blob store, and so do small ones for which there is no
   * `room` left.
   */
  async #store(
    part: MultipartPart,
    room: number,
    signal: AbortSignal | undefined,
  ): Promise<Pick<DataWrite, 'digest' | 'size' | 'bytes'>> {
    const { blobs, limits, store } = this.#ctx;
    const most = store.small === undefined ? -1 : Math.min(room, store.small.maxBytes, limits.dataBytes);
    const held: Uint8Array[] = [];
    let size = 0;
    while (size <= most) {
      const chunk = await part.pull();
      if (chunk === null) {
        const bytes = held.length === 1 ? held[0]! : Buffer.concat(held, size);
        return { digest: digestOf(bytes), size, bytes };
      }
      held.push(chunk);
      size += chunk.length;
    }
    // The item's own bound: more than it must not be stored just because the request may be larger.
    return await blobs.put(chunksOf(part, held), {
      maxBytes: limits.dataBytes,
      ...(signal !== undefined && { signal }),
    });
  }

  /** `POST …/data/multipart`: with `uploads` begins, with `uploadId` completes a chunked upload. */
  async startOrFinish(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const query = request.query as RawQuery;
    if (query['uploads'] !== undefined) return this.#start(request, reply);
    if (query['uploadId'] !== undefined) return this.#finish(request, reply);
    throw new MillraceError('invalid_argument', 'POST …/multipart needs ?uploads or ?uploadId=<id>');
  }

  async #start(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { domainId, access } = await this.#authorize(request, 'write');
    const { limits, store, clock, blobs } = this.#ctx;
    const body = await this.#json(request, reply, startUploadBody);
    checkDataName(body.name, 'name');
    checkDataName(body.data_type, 'data_type');
    const size = body.size ?? null;
    if (size !== null && size > limits.dataBytes) throw tooLarge('size', limits.dataBytes, 'dataBytes');
    const existingId = body.existing_id == null ? null : requireUuid(body.existing_id, 'existing_id');
    if (existingId !== null && (await store.getData(domainId, existingId)) === null) {
      throw new MillraceError('not_found', `no data item ${existingId} in domain ${domainId}`);
    }
    const upload = {
      id: randomUUID(),
      domainId,
      name: body.name,
      dataType: body.data_type,
      size,
      existingId,
      dataId: existingId ?? randomUUID(),
      // What is known as a whole goes past us as a whole: then nobody has to read it again to know what it is.
      partSize:
        blobs.directParts !== undefined && body.sha256 != null && size !== null && size <= DIRECT_WHOLE_BYTES
          ? Math.max(limits.partBytes, size)
          : limits.partBytes,
      expiresAtMs: clock.now() + UPLOAD_TTL_MS,
      lease: access.lease,
    };
    await store.createUpload(upload);
    // The reference's client sends one part after the other, so ours does that too unless it is told.
    return reply.header('millrace-parallel-parts', '1').send({
      upload_id: upload.id,
      part_size: upload.partSize,
      data_id: upload.dataId,
      expires_at: new Date(upload.expiresAtMs).toISOString(),
    });
  }

  /** `PUT …/data/multipart`: one part. Sending a part again replaces it. */
  async part(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const upload = (await this.#upload(request)).upload;
    const { limits, blobs, store } = this.#ctx;
    const text = values((request.query as RawQuery)['partNumber'])[0];
    const partNumber = Number(text);
    const most = Math.ceil(Math.max(1, upload.size ?? limits.dataBytes) / upload.partSize);
    if (text === undefined || !/^\d+$/.test(text) || partNumber < 1 || partNumber > most) {
      throw new MillraceError(
        'invalid_argument',
        `partNumber must be an integer from 1 to ${most}, got ${JSON.stringify(text?.slice(0, 40) ?? null)}`,
      );
    }
    const maxBytes = partBytes(upload, partNumber, limits.dataBytes);
    const expect = upload.size === null ? {} : { expect: { size: maxBytes } };
    const announced = contentLength(request);
    if (announced !== null && announced > maxBytes)
      throw tooLarge(`part ${partNumber}`, maxBytes, 'part size');
    const bounds = { limit: maxBytes, name: 'part size', deadline: false };
    const part = await withBody(this.#ctx, request, reply, bounds, async (body, signal) => {
      try {
        const at = (partNumber - 1) * upload.partSize;
        return await blobs.putPart(upload.id, partNumber, body, { maxBytes, signal, at, ...expect });
      } catch (error) {
        // A short part is the client's mistake, not lost data.
        if (isDataLoss(error)) {
          throw new MillraceError('invalid_argument', error.message, { cause: error });
        }
        throw error;
      }
    });
    try {
      await store.putPart(upload.id, { partNumber, etag: part.digest, size: part.size });
    } catch (error) {
      // Aborted or completed while this part was on its way: what it staged is nobody's.
      if (MillraceError.is(error) && error.code === 'not_found') await blobs.dropParts(upload.id);
      throw error;
    }
    return reply.send({ etag: part.digest });
  }

  /** `POST …/data/multipart/direct`: how parts are put past the dispatcher. Other stores do not have it. */
  async directParts(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { upload } = await this.#upload(request);
    const { blobs, limits } = this.#ctx;
    const { parts } = await this.#json(request, reply, directPartsBody);
    if (blobs.directParts === undefined) {
      throw new MillraceError('unimplemented', 'parts of an upload are taken by the dispatcher only');
    }
    const puts = await directPuts(blobs.directParts, upload, parts, limits.dataBytes);
    return reply.header('cache-control', 'no-store').send({ parts: puts });
  }

  async #finish(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { upload, access, completed } = await this.#uploadOrCompleted(request);
    if (completed !== null) return reply.send(completed);
    const { blobs, store } = this.#ctx;
    const { parts } = await this.#json(request, reply, finishUploadBody);
    const { directParts } = blobs;
    const stored = checkParts(
      directParts === undefined ? upload : await withDirectParts(directParts, upload, parts),
      parts,
    );
    const blob = await blobs.joinParts(
      upload.id,
      stored.map(({ partNumber, etag, size }) => ({ partNumber, digest: etag, size })),
    );
    const [record] = await store.putData([
      {
        domainId: upload.domainId,
        id: upload.existingId,
        name: upload.name,
        dataType: upload.dataType,
        digest: blob.digest,
        size: blob.size,
        lease: upload.lease,
        ownOnly: confined(access),
        replaceByName: true,
        createId: upload.dataId,
      },
    ]);
    if (record === undefined) throw new MillraceError('internal', 'the store answered a write with nothing');
    this.#completed.set(upload.id, { domainId: upload.domainId, dataId: record.id });
    // From here on a failure only leaves parts behind until the upload expires.
    await store.deleteUpload(upload.id);
    await blobs.dropParts(upload.id);
    return reply.send(record);
  }

  /** `DELETE …/data/multipart`: forgets an upload and its parts. */
  async abort(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { upload } = await this.#upload(request);
    // In this order: a part that arrives meanwhile is either dropped here, or finds no upload and drops itself.
    await this.#ctx.store.deleteUpload(upload.id);
    await this.#ctx.blobs.dropParts(upload.id);
    return reply.code(204).send();
  }

  /** `GET …/data/{id}`: metadata, or with `?raw=true` the bytes. */
  async item(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { domainId } = await this.#authorize(request, 'read');
    const id = requireUuid((request.params as { dataId: string }).dataId, 'data id');
    const record = await this.#record(domainId, id);
    if (values((request.query as RawQuery)['raw'])[0] !== 'true') return reply.send(record);
    return this.#sendRaw(request, reply, record);
  }

  /** `DELETE …/data/{id}` */
  async remove(request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> {
    const { domainId, access } = await this.#authorize(request, 'write');
    if (access.lease !== null) {
      throw new MillraceError(
        'permission_denied',
        'the token of a lease may not delete data; use a client token',
      );
    }
    const id = requireUuid((request.params as { dataId: string }).dataId, 'data id');
    if (!(await this.#ctx.store.deleteData(domainId, id))) {
      throw new MillraceError('not_found', `no data item ${id} in domain ${domainId}`);
    }
    return reply.code(204).send();
  }

  async #authorize(
    request: FastifyRequest,
    access: Access,
  ): Promise<{ readonly domainId: string; readonly access: DomainAccess }> {
    const domainId = requireUuid((request.params as { domainId: string }).domainId, 'domain id');
    return { domainId, access: await this.#ctx.auth.domain(request, domainId, access) };
  }

  async #record(domainId: string, id: string): Promise<DataRecord> {
    const record = await this.#ctx.store.getData(domainId, id);
    if (record === null) throw new MillraceError('not_found', `no data item ${id} in domain ${domainId}`);
    return record;
  }

  async #upload(
    request: FastifyRequest,
  ): Promise<{ readonly upload: UploadRecord; readonly access: DomainAccess }> {
    const { upload, access, completed } = await this.#uploadOrCompleted(request);
    if (completed !== null) {
      throw new MillraceError(
        'not_found',
        `upload ${values((request.query as RawQuery)['uploadId'])[0]} is completed`,
      );
    }
    return { upload, access };
  }

  /** The upload of `?uploadId`, if this token may have it; or what became of it, if it was completed lately. */
  async #uploadOrCompleted(
    request: FastifyRequest,
  ): Promise<
    | { readonly upload: UploadRecord; readonly access: DomainAccess; readonly completed: null }
    | { readonly upload: null; readonly access: DomainAccess; readonly completed: DataRecord }
  > {
    const { domainId, access } = await this.#authorize(request, 'write');
    const { store, clock } = this.#ctx;
    const id = requireUuid(values((request.query as RawQuery)['uploadId'])[0], 'uploadId');
    const upload = await store.getUpload(domainId, id);
    const completed = this.#completed.get(id);
    if (upload === null && completed?.domainId === domainId) {
      return { upload: null, access, completed: await this.#record(domainId, completed.dataId) };
    }
    const foreign = access.lease !== null && upload?.lease?.leaseId !== access.lease.leaseId;
    if (upload === null || foreign || upload.expiresAtMs <= clock.now()) {
      throw new MillraceError('not_found', `no upload ${id} in domain ${domainId}`);
    }
    return { upload, access, completed: null };
  }

  async #sendRaw(request: FastifyRequest, reply: FastifyReply, first: DataRecord): Promise<FastifyReply> {
    let record = first;
    for (let attempt = 1; ; attempt += 1) {
      const etag = `"${record.digest}"`;
      void reply
        .header('etag', etag)
        .header('accept-ranges', 'bytes')
        .header('cache-control', 'private, no-cache');
      if (matchesEtag(headerOf(request, 'if-none-match'), etag)) return reply.code(304).send();
      // Whatever it is, it is not for a browser to run: the dashboard has this origin.
      void reply.header('x-content-type-options', 'nosniff').type('application/octet-stream');
      const ifRange = headerOf(request, 'if-range');
      const range =
        ifRange === null || ifRange === etag ? byteRange(headerOf(request, 'range'), record.size) : null;
      if (range === 'unsatisfiable') {
        return reply
          .code(416)
          .header('content-range', `bytes */${record.size}`)
          .type('text/plain; charset=utf-8')
          .send(`range ${headerOf(request, 'range')} is not within the ${record.size} bytes of ${record.id}`);
      }
      const small = await this.#small(record);
      if (small !== null) return sendBytes(reply, small, range);
      const elsewhere = headerOf(request, 'millrace-direct') === '1' ? await this.#directUrl(record) : null;
      if (elsewhere !== null) {
        return reply.code(307).header('cache-control', 'no-store').header('location', elsewhere).send();
      }
      const body = await this.#openBlob(record, range ?? undefined);
      if (body !== null) {
        if (range === null) return reply.header('content-length', record.size).send(body);
        return reply
          .code(206)
          .header('content-range', `bytes ${range.start}-${range.end}/${record.size}`)
          .header('content-length', range.end - range.start + 1)
          .send(body);
      }
      if (attempt === READ_TRIES) throw bytesMissing(record);
      record = await this.#record(record.domain_id, record.id);
    }
  }

  async #sendMultipart(reply: FastifyReply, records: readonly DataRecord[]): Promise<FastifyReply> {
    // What is small is held from here on, as far as there is room: mostly that is the whole answer.
    const held = new Map<DataRecord, Uint8Array>();
    let room = HELD_BYTES;
    for (const record of records) {
      const small = await this.#small(record);
      if (small !== null) {
        if (small.length <= room) held.set(record, small);
        room -= small.length;
        continue;
      }
      const stored = await this.#ctx.blobs.stat(record.digest);
      if (stored === null || stored.size !== record.size) throw bytesMissing(record);
      if (this.#doubtful.get(record.digest)) await this.#check(record);
    }
    const boundary = randomBytes(30).toString('hex');
    const heads = records.map((record) => downloadPartHead(record, boundary));
    const tail = downloadTail(boundary);
    const length = records.reduce(
      (sum, record, index) => sum + heads[index]!.length + record.size + 2,
      tail.length,
    );
    void reply.header('content-length', length).type(`multipart/form-data; boundary=${boundary}`);
    if (held.size === records.length) {
      const pieces = records.flatMap((record, index) => [heads[index]!, held.get(record)!, LINE_END]);
      return reply.send(Buffer.concat([...pieces, tail], length));
    }
    const small = async (record: DataRecord): Promise<Uint8Array | null> =>
      held.get(record) ?? (await this.#small(record));
    const openBlob = (record: DataRecord): Promise<Readable | null> => this.#openBlob(record);
    const chunks = (async function* (): AsyncGenerator<Uint8Array> {
      for (const [index, record] of records.entries()) {
        yield heads[index]!;
        const bytes = await small(record);
        if (bytes === null) {
          const body = await openBlob(record);
          if (body === null) throw bytesMissing(record);
          yield* body as AsyncIterable<Buffer>;
        } else yield bytes;
        yield LINE_END;
      }
      yield tail;
    })();
    return reply.send(
      readableFrom({
        pull: async () => {
          const next = await chunks.next();
          return next.done === true ? null : next.value;
        },
        close: async () => {
          await chunks.return(undefined);
        },
      }),
    );
  }

  /** The bytes of an item the store keeps with its name, verified; null for any other. */
  async #small(record: DataRecord): Promise<Uint8Array | null> {
    const { small } = this.#ctx.store;
    if (small === undefined || record.size > small.maxBytes) return null;
    const bytes = await small.get(record.digest);
    if (bytes === null) return null;
    if (bytes.length !== record.size || digestOf(bytes) !== record.digest) throw bytesMissing(record);
    return bytes;
  }

  /** Where the client may read the bytes itself; null when it may not, or when they are not there. */
  async #directUrl(record: DataRecord): Promise<string | null> {
    const { blobs } = this.#ctx;
    if (blobs.direct === undefined) return null;
    const stored = await blobs.stat(record.digest);
    return stored?.size === record.size ? blobs.direct.url(record.digest, DIRECT_URL_SECS) : null;
  }

  /** Null when the bytes are not there: collected since the record was read, or lost. */
  async #openBlob(
    record: DataRecord,
    range?: { readonly start: number; readonly end: number },
  ): Promise<Readable | null> {
    const { blobs } = this.#ctx;
    const stored = await blobs.stat(record.digest);
    if (stored === null) return null;
    if (stored.size !== record.size) throw bytesMissing(record);
    try {
      if (this.#doubtful.get(record.digest)) await this.#check(record);
      const body = await blobs.open(record.digest, range);
      // The answer has begun by then and can only break off; who reads it is told why when it tries again.
      body.once('error', (error: Error) => {
        if (isDataLoss(error)) this.#doubtful.set(record.digest, true);
        this.#ctx.log.error('stored bytes cannot be read', {
          data_id: record.id,
          error: error.message,
        });
      });
      return body;
    } catch (error) {
      if (MillraceError.is(error) && error.code === 'not_found') return null;
      throw error;
    }
  }

  /** Reads a blob that was found damaged before an answer begins. @throws MillraceError `data_loss` when it still is */
  async #check(record: DataRecord): Promise<void> {
    try {
      for await (const _ of await this.#ctx.blobs.open(record.digest));
    } catch (error) {
      throw isDataLoss(error) ? bytesMissing(record) : error;
    }
    this.#doubtful.delete(record.digest);
  }

  async #json<T>(request: FastifyRequest, reply: FastifyReply, schema: z.ZodType<T>): Promise<T> {
    const limit = this.#ctx.limits.jsonBodyBytes;
    const bounds = { limit, name: 'jsonBodyBytes', deadline: true };
    const announced = contentLength(request);
    const bytes =
      announced !== null && announced <= Math.min(limit, SHORT_BODY_BYTES)
        ? await shortBody(request)
        : await withBody(this.#ctx, request, reply, bounds, async (body) => {
            const chunks: Uint8Array[] = [];
            for await (const chunk of body) chunks.push(chunk);
            return Buffer.concat(chunks);
          });
    const text = bytes.toString('utf8');
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (cause) {
      throw new MillraceError('invalid_argument', `body: not valid JSON (${text.length} characters)`, {
        cause,
      });
    }
    const parsed = schema.safeParse(value);
    if (parsed.success) return parsed.data;
    const [issue] = parsed.error.issues;
    throw new MillraceError(
      'invalid_argument',
      `body.${issue?.path.join('.') ?? ''}: ${issue?.message ?? 'invalid'}`,
    );
  }
}

type RawQuery = Readonly<Record<string, string | string[] | undefined>>;

const LINE_END = Buffer.from('\r\n');

function values(value: string | string[] | undefined): readonly string[] {
  return value === undefined ? [] : Array.isArray(value) ? value : [value];
}

async function* once(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  yield bytes;
}

async function* chunksOf(part: MultipartPart, first: readonly Uint8Array[]): AsyncGenerator<Uint8Array> {
  yield* first;
  for (let chunk = await part.pull(); chunk !== null; chunk = await part.pull()) yield chunk;
}

function sendBytes(
  reply: FastifyReply,
  bytes: Uint8Array,
  range: { readonly start: number; readonly end: number } | null,
): FastifyReply {
  if (range === null) return reply.send(bytes);
  return reply
    .code(206)
    .header('content-range', `bytes ${range.start}-${range.end}/${bytes.length}`)
    .send(bytes.subarray(range.start, range.end + 1));
}

function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

/** A task with an outputs prefix keeps to what its job made. */
function confined(access: DomainAccess): boolean {
  return access.lease !== null && access.prefix !== null && access.prefix !== '';
}

function uploadTarget(
  part: MultipartPart,
  replace: boolean,
): { readonly id: string | null; readonly name: string | null; readonly dataType: string | null } {
  const { params } = part;
  const name = params.get('name');
  const dataType = params.get('data-type');
  const id = params.get('id');
  if (replace) {
    if (id === undefined) {
      throw new MillraceError('invalid_argument', 'PUT needs id="…" in the Content-Disposition of the part');
    }
    return {
      id: requireUuid(id, 'id'),
      name: name === undefined ? null : checkDataName(name, 'name'),
      dataType: dataType === undefined ? null : checkDataName(dataType, 'data-type'),
    };
  }
  if (id !== undefined || name === undefined || dataType === undefined) {
    throw new MillraceError(
      'invalid_argument',
      'POST needs name="…" and data-type="…", and no id, in the Content-Disposition of the part',
    );
  }
  return { id: null, name: checkDataName(name, 'name'), dataType: checkDataName(dataType, 'data-type') };
}

/** The stored parts, if they are all there, are the ones the client means, and have the sizes they must have. */
function checkParts(
  upload: UploadRecord,
  parts: readonly { readonly part_number: number; readonly etag: string }[],
): UploadRecord['parts'] {
  const stored = new Map(upload.parts.map((part) => [part.partNumber, part]));
  let total = 0;
  const chosen = parts.map((part, index) => {
    const found = stored.get(part.part_number);
    if (part.part_number !== index + 1) {
      throw new MillraceError(
        'invalid_argument',
        `parts must be 1, 2, 3 … without gaps, got ${part.part_number} in place ${index + 1}`,
      );
    }
    if (found === undefined) {
      throw new MillraceError('invalid_argument', `part ${part.part_number} was not uploaded`);
    }
    if (found.etag !== part.etag) {
      throw new MillraceError(
        'invalid_argument',
        `part ${part.part_number} has the etag ${found.etag}, got ${JSON.stringify(part.etag.slice(0, 80))}`,
      );
    }
    if (index < parts.length - 1 && found.size !== upload.partSize) {
      throw new MillraceError(
        'invalid_argument',
        `part ${part.part_number} must be ${upload.partSize} bytes like all but the last, got ${found.size}`,
      );
    }
    total += found.size;
    return found;
  });
  if (upload.size !== null && total !== upload.size) {
    throw new MillraceError(
      'invalid_argument',
      `the parts add up to ${total} bytes, ${upload.size} were announced`,
    );
  }
  return chosen;
}

function bytesMissing(record: DataRecord): MillraceError {
  return new MillraceError(
    'data_loss',
    `the stored bytes of data item ${record.id} (${record.digest}, ${record.size} bytes) are missing or damaged`,
  );
}

function isDataLoss(error: unknown): error is MillraceError {
  return MillraceError.is(error) && error.code === 'data_loss';
}
