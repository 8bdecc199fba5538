import { createHash } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { MillraceError } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Computes } from '../client/computes.ts';
import { openComputes } from '../client/http-computes.ts';
import { connect } from '../client/http-requestor.ts';
import { Harness, TIME, until } from '../harness.test.support.ts';

const LIMIT = 64 * 1024;

function nameOf(bytes: Uint8Array): { readonly alg: 'sha256'; readonly digest: string } {
  return { alg: 'sha256', digest: createHash('sha256').update(bytes).digest('hex') };
}

async function codeOf(promise: Promise<unknown>): Promise<string> {
  return await promise.then(
    () => 'ok',
    (error: unknown) => (MillraceError.is(error) ? error.code : String(error)),
  );
}

describe('computes over HTTP', () => {
  let harness: Harness;
  let computes: Computes & AsyncDisposable;

  beforeAll(async () => {
    harness = await Harness.open({ limits: { computeBytes: LIMIT } });
    computes = clientWith(harness.clientToken);
  });
  afterAll(async () => {
    await computes[Symbol.asyncDispose]();
    await harness[Symbol.asyncDispose]();
  });

  function clientWith(token: string): Computes & AsyncDisposable {
    return openComputes({
      baseUrl: `${harness.dispatcher.url}/v1`,
      tokens: { get: () => Promise.resolve(token), invalidate: () => undefined },
    });
  }

  async function bytesOf(name: { alg: string; digest: string }): Promise<Buffer | null> {
    const found = await computes.open(name);
    if (found === null) return null;
    const chunks: Buffer[] = [];
    for await (const chunk of found.body as AsyncIterable<Buffer>) chunks.push(chunk);
    return Buffer.concat(chunks);
  }

  test('what was put is told, given and listed, with its engine', async () => {
    const bytes = Buffer.from('a compute');
    const name = nameOf(bytes);
    expect(await computes.stat(name)).toBeNull();
    expect(await computes.open(name)).toBeNull();
    const record = await computes.put(name, 'quickjs', bytes);
    expect(record).toEqual({
      ref: `compute://sha256/${name.digest}`,
      alg: 'sha256',
      digest: name.digest,
      engine: 'quickjs',
      bytes: 9,
      created_at: expect.stringMatching(TIME),
    });
    expect(await computes.stat(name)).toEqual({ engine: 'quickjs', bytes: 9 });
    expect(await bytesOf(name)).toEqual(bytes);
    expect((await computes.list()).items).toContainEqual(record);
    expect(await computes.put(name, 'quickjs', bytes)).toEqual(record);
  });

  test('other bytes than the digest says are refused, naming both, and nothing of them is kept', async () => {
    const name = nameOf(Buffer.from('promised'));
    const sent = Buffer.from('something else');
    const refused = computes.put(name, 'wasm', sent);
    await expect(refused).rejects.toThrow(
      `the bytes sent for compute://sha256/${name.digest} have the sha256 ${nameOf(sent).digest}; nothing was kept`,
    );
    expect(await codeOf(refused)).toBe('invalid_argument');
    expect(await computes.stat(name)).toBeNull();
    expect(await computes.stat(nameOf(sent))).toBeNull();
    const digests = [name, nameOf(sent)].map(({ digest }) => `sha256:${digest}`);
    expect(await harness.store.missingComputes(digests)).toEqual(digests);
  });

  test('a compute of computeBytes is taken and one byte more is not, whether or not its length is announced', async () => {
    const fits = Buffer.alloc(LIMIT, 1);
    const streamed = Readable.from([fits.subarray(0, 1000), fits.subarray(1000)]);
    expect((await computes.put(nameOf(fits), 'wasm', streamed)).bytes).toBe(LIMIT);
    const large = Buffer.alloc(LIMIT + 1, 2);
    for (const body of [large, Readable.from([large.subarray(0, LIMIT), large.subarray(LIMIT)])]) {
      const refused = computes.put(nameOf(large), 'wasm', body);
      await expect(refused).rejects.toThrow(`at most ${LIMIT} bytes (computeBytes)`);
      expect(await codeOf(refused)).toBe('resource_exhausted');
    }
    expect(await computes.stat(nameOf(large))).toBeNull();
  });

  test('an upload that breaks off leaves nothing', async () => {
    const bytes = Buffer.from('never whole');
    const broken = Readable.from(
      (async function* () {
        yield bytes.subarray(0, 5);
        await Promise.resolve();
        throw new Error('the client fell over');
      })(),
    );
    await expect(computes.put(nameOf(bytes), 'wasm', broken)).rejects.toThrow();
    expect(await computes.stat(nameOf(bytes))).toBeNull();
  });

  test('the engine of a compute is not changed by putting it again', async () => {
    const bytes = Buffer.from('of one engine');
    await computes.put(nameOf(bytes), 'wasm', bytes);
    const again = computes.put(nameOf(bytes), 'quickjs', bytes);
    await expect(again).rejects.toThrow('is there for the engine wasm, not for quickjs');
    expect(await codeOf(again)).toBe('already_exists');
    expect((await computes.stat(nameOf(bytes)))?.engine).toBe('wasm');
  });

  test('without an engine it is the one of the reference, and a name that is none is refused', async () => {
    const bytes = Buffer.from('bare put');
    const path = `/v1/computes/sha256/${nameOf(bytes).digest}`;
    const put = (query: string) =>
      harness.call('PUT', `${path}${query}`, {
        raw: bytes.toString(),
        headers: { 'content-type': 'application/wasm' },
      });
    for (const engine of ['', 'UPPER', '-x', 'a'.repeat(65)]) {
      const answer = await put(`?engine=${engine}`);
      expect([answer.status, answer.body.error.code]).toEqual([400, 'invalid_argument']);
    }
    const answer = await put('');
    expect([answer.status, answer.body.engine]).toEqual([200, 'wazero']);
  });

  test('only sha256 and 64 lower-case hex digits name a compute', async () => {
    for (const [path, said] of [
      ['blake3/00', 'digest algorithm \\"blake3\\"'],
      ['sha256/abc', '64 lower-case hex digits'],
      [`sha256/${'A'.repeat(64)}`, '64 lower-case hex digits'],
      ['sha256/..%2f..%2fetc%2fpasswd', '64 lower-case hex digits'],
    ] as const) {
      for (const method of ['PUT', 'GET', 'DELETE'] as const) {
        const answer = await harness.call(method, `/v1/computes/${path}`);
        expect([answer.status, answer.body.error.code]).toEqual([400, 'invalid_argument']);
        expect(answer.text).toContain(said);
      }
      expect((await harness.call('HEAD', `/v1/computes/${path}`)).status).toBe(400);
    }
  });

  test('HEAD tells length, engine and tag; GET gives ranges, and nothing to who has it', async () => {
    const bytes = Buffer.from('0123456789');
    const name = nameOf(bytes);
    await computes.put(name, 'wasm', bytes);
    const path = `/v1/computes/sha256/${name.digest}`;
    const tag = `"sha256:${name.digest}"`;
    const head = await harness.call('HEAD', path);
    expect(head.status).toBe(200);
    expect(head.text).toBe('');
    expect(
      ['content-length', 'etag', 'accept-ranges', 'millrace-compute-engine', 'x-content-type-options'].map(
        (header) => head.header(header),
      ),
    ).toEqual(['10', tag, 'bytes', 'wasm', 'nosniff']);
    const get = (headers: Record<string, string>) => harness.call('GET', path, { headers });
    const part = await get({ range: 'bytes=2-4' });
    expect([part.status, part.text, part.header('content-range')]).toEqual([206, '234', 'bytes 2-4/10']);
    const tail = await get({ range: 'bytes=-3' });
    expect([tail.status, tail.text]).toEqual([206, '789']);
    const beyond = await get({ range: 'bytes=10-' });
    expect([beyond.status, beyond.header('content-range')]).toEqual([416, 'bytes */10']);
    expect((await get({ range: 'bytes=2-4', 'if-range': '"other"' })).text).toBe('0123456789');
    const had = await get({ 'if-none-match': tag });
    expect([had.status, had.text]).toEqual([304, '']);
    const absent = await harness.call('GET', `/v1/computes/sha256/${'0'.repeat(64)}`);
    expect([absent.status, absent.body.error.code]).toEqual([404, 'not_found']);
    expect((await harness.call('HEAD', `/v1/computes/sha256/${'0'.repeat(64)}`)).status).toBe(404);
  });

  test('a list goes on where the cursor says', async () => {
    for (const text of ['page 1', 'page 2', 'page 3']) {
      await computes.put(nameOf(Buffer.from(text)), 'wasm', Buffer.from(text));
    }
    const refs: string[] = [];
    let cursor: string | null = null;
    do {
      const page = await computes.list({ limit: 2, ...(cursor !== null && { cursor }) });
      expect(page.items.length).toBeLessThanOrEqual(2);
      refs.push(...page.items.map((item) => item.digest));
      cursor = page.next_cursor;
    } while (cursor !== null);
    expect(refs.slice(0, 3)).toEqual(
      ['page 3', 'page 2', 'page 1'].map((text) => nameOf(Buffer.from(text)).digest),
    );
    expect(new Set(refs).size).toBe(refs.length);
    for (const query of ['limit=0', 'limit=1001', 'limit=x', 'cursor=x']) {
      expect((await harness.call('GET', `/v1/computes?${query}`)).status).toBe(400);
    }
  });

  test('nodes read and do no more; readers write nothing; one domain does not delete for all', async () => {
    const bytes = Buffer.from('guarded');
    const name = nameOf(bytes);
    const path = `/v1/computes/sha256/${name.digest}`;
    const node = await harness.joinNode();
    const reader = await harness.dispatcher.issueClientToken({ readOnly: true });
    const ofDomain = await harness.dispatcher.issueClientToken({
      domainId: harness.dispatcher.defaultDomainId,
    });
    const status = async (token: string | null, method: 'GET' | 'HEAD' | 'PUT' | 'DELETE', at = path) =>
      (
        await harness.call(method, at, {
          token,
          ...(method === 'PUT' && { raw: bytes.toString() }),
        })
      ).status;
    expect([await status(null, 'PUT'), await status(reader, 'PUT'), await status(node.token, 'PUT')]).toEqual(
      [401, 401, 403],
    );
    expect(await status(ofDomain, 'PUT')).toBe(200);
    for (const token of [harness.clientToken, reader, ofDomain, node.token]) {
      expect([await status(token, 'HEAD'), await status(token, 'GET')]).toEqual([200, 200]);
    }
    expect(await status(null, 'GET')).toBe(401);
    expect([
      await status(reader, 'GET', '/v1/computes'),
      await status(node.token, 'GET', '/v1/computes'),
    ]).toEqual([200, 403]);
    expect([
      await status(reader, 'DELETE'),
      await status(node.token, 'DELETE'),
      await status(ofDomain, 'DELETE'),
    ]).toEqual([401, 403, 403]);
    expect(await status(harness.clientToken, 'DELETE')).toBe(204);
    expect(await status(harness.clientToken, 'DELETE')).toBe(404);
    await using asNode = clientWith(node.token);
    expect(await asNode.stat(name)).toBeNull();
  });

  test('a token that is refused is asked for anew, once', async () => {
    const bytes = Buffer.from('for a node that logs in again');
    await computes.put(nameOf(bytes), 'wasm', bytes);
    const tokens = ['stale', harness.clientToken];
    const invalidated: string[] = [];
    await using client = openComputes({
      baseUrl: `${harness.dispatcher.url}/v1`,
      tokens: {
        get: () => Promise.resolve(tokens[0]!),
        invalidate: (token) => {
          invalidated.push(token);
          tokens.shift();
        },
      },
    });
    expect((await client.stat(nameOf(bytes)))?.bytes).toBe(bytes.length);
    expect(invalidated).toEqual(['stale']);
  });

  test('bytes that went missing are said to be lost, not sent short', async () => {
    const bytes = Buffer.from('soon gone');
    await using own = await Harness.open();
    await using client = openComputes({
      baseUrl: `${own.dispatcher.url}/v1`,
      tokens: { get: () => Promise.resolve(own.clientToken), invalidate: () => undefined },
    });
    await client.put(nameOf(bytes), 'wasm', bytes);
    await own.blobs.delete(`sha256:${nameOf(bytes).digest}`);
    const answer = await own.call('GET', `/v1/computes/sha256/${nameOf(bytes).digest}`);
    expect([answer.status, answer.body.error.code]).toEqual([500, 'data_loss']);
    expect(answer.header('etag')).toBeNull();
    await client.put(nameOf(bytes), 'wasm', bytes);
    expect((await own.call('GET', `/v1/computes/sha256/${nameOf(bytes).digest}`)).text).toBe('soon gone');
  });

  test('bytes that were changed are said to be so, not sent, and may be put again', async () => {
    const bytes = Buffer.from('soon another');
    const { alg, digest } = nameOf(bytes);
    await using own = await Harness.open();
    await using client = openComputes({
      baseUrl: `${own.dispatcher.url}/v1`,
      tokens: { get: () => Promise.resolve(own.clientToken), invalidate: () => undefined },
    });
    await client.put({ alg, digest }, 'wasm', bytes);
    const path = join(own.blobsDir, 'sha256', digest.slice(0, 2), digest);
    await writeFile(path, 'soon changed');
    const answer = await own.call('GET', `/v1/computes/${alg}/${digest}`);
    expect([answer.status, answer.body.error.code]).toEqual([500, 'data_loss']);
    expect(answer.body.error.message).toContain(digest);
    expect(answer.header('content-type')).toMatch(/^application\/json/);
    // Nobody may keep this answer as the compute.
    for (const header of ['etag', 'cache-control', 'millrace-compute-engine']) {
      expect(answer.header(header)).toBeNull();
    }
    await expect(client.open({ alg, digest })).rejects.toMatchObject({ code: 'data_loss', retryable: false });
    await client.put({ alg, digest }, 'wasm', bytes);
    expect((await own.call('GET', `/v1/computes/${alg}/${digest}`)).text).toBe('soon another');
  });

  test('a job that names a compute which is not here is refused, naming it, and nothing is submitted', async () => {
    const bytes = Buffer.from('there');
    const there = (await computes.put(nameOf(bytes), 'wasm', bytes)).ref;
    const absent = `compute://sha256/${'e'.repeat(64)}`;
    const other = 'compute://blake3/zz';
    const requestor = connect({ url: harness.dispatcher.url, token: harness.clientToken });
    try {
      const before = (await requestor.jobs()).items.length;
      const submit = (meta: unknown, jobMeta: Record<string, never> | { deep: unknown } = {}) =>
        requestor.submit({
          meta: jobMeta as never,
          tasks: [{ capability: '/compute/v1', meta }],
        });
      const refused = submit({ ref: absent, input: [{ deep: [other, there] }] });
      await expect(refused).rejects.toThrow(
        `the job names a compute that is not stored here: ${absent}; store it first ("millrace compute push"); ` +
          `it names ${other}, which is no ref of a compute: want compute://sha256/ and 64 lower-case hex digits`,
      );
      expect(await codeOf(refused)).toBe('invalid_argument');
      expect(await codeOf(submit({ ref: there }, { deep: [{ ref: absent }] }))).toBe('invalid_argument');
      // Where code is named, a text that no scan takes for a ref is a mistake as well.
      for (const bad of ['compute://sha256/abc', `compute://SHA256/${'E'.repeat(64)}`, 'compute://']) {
        for (const meta of [{ ref: bad }, { wasm: { module: bad } }]) {
          await expect(submit(meta)).rejects.toThrow(`the job names ${bad}, which is no ref of a compute`);
        }
      }
      expect((await requestor.jobs()).items.length).toBe(before);
      // Only a whole text is a ref.
      await submit({ ref: there, note: `see ${absent}`, scheme: 'compute://', [absent]: 1 });
      expect((await requestor.jobs()).items.length).toBe(before + 1);
    } finally {
      await requestor.close();
    }
  });

  test('closing the server ends an upload under way', async () => {
    const own = await Harness.open();
    const bytes = Buffer.from('stuck');
    let began = (): void => undefined;
    const started = new Promise<void>((resolve) => (began = resolve));
    const stuck = new Readable({
      read() {
        began();
      },
    });
    stuck.push(bytes.subarray(0, 2));
    const client = openComputes({
      baseUrl: `${own.dispatcher.url}/v1`,
      tokens: { get: () => Promise.resolve(own.clientToken), invalidate: () => undefined },
    });
    const put = codeOf(client.put(nameOf(bytes), 'wasm', stuck));
    await started;
    await until(async () => (await own.call('GET', '/health')).status === 200);
    await own[Symbol.asyncDispose]();
    expect(await put).not.toBe('ok');
    await client[Symbol.asyncDispose]();
  });
});
