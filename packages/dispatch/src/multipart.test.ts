import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  downloadBoundary,
  downloadPartHead,
  downloadTail,
  readDownload,
  readUpload,
  uploadBoundary,
  uploadEnvelope,
  type MultipartPart,
} from './multipart.ts';
import type { DataRecord } from './records.ts';

const B = '4d6f'.repeat(15);

describe('a download', () => {
  test('is written as the real server does: disposition first, six digits of a second, sizes', () => {
    const item = record({ name: 'scan_2024-01-02_03-04-05', data_type: 'refined_scan_zip', size: 4 });
    expect(downloadPartHead(item, B).toString()).toBe(
      `--${B}\r\n` +
        'Content-Disposition: form-data; name="scan_2024-01-02_03-04-05"; data-type="refined_scan_zip"; ' +
        `id="${item.id}"; domain-id="${item.domain_id}"; size="4"; created-at="2026-05-01T10:00:00.123000Z"; ` +
        `updated-at="2026-05-01T10:00:01.000000Z"; digest="${item.digest}"\r\n` +
        'Content-Type: application/octet-stream\r\n\r\n',
    );
    expect(downloadTail(B).toString()).toBe(`--${B}--\r\n`);
  });

  test('reads back what was written, cut into chunks anywhere, also payloads that contain the boundary', async () => {
    const payload = fc.oneof(
      fc.uint8Array({ maxLength: 300 }),
      fc
        .constantFrom(`--${B}--\r\n`, `\r\n--${B}\r\n`, `\r\n--${B}--`, '\r\n', '\n')
        .map((s) => Buffer.from(s)),
    );
    await fc.assert(
      fc.asyncProperty(fc.array(payload, { minLength: 1, maxLength: 4 }), cuts(), async (payloads, cut) => {
        const body = Buffer.concat([
          ...payloads.flatMap((bytes, index) => [
            downloadPartHead(record({ name: `n${index}`, size: bytes.length }), B),
            bytes,
            Buffer.from('\r\n'),
          ]),
          downloadTail(B),
        ]);
        const parts = await collect(readDownload(cutUp(body, cut), B));
        expect(parts.map((part) => part.params['name'])).toEqual(payloads.map((_, index) => `n${index}`));
        expect(parts.map((part) => part.bytes)).toEqual(payloads.map((bytes) => Buffer.from(bytes)));
      }),
    );
  });

  test('with bare line feeds, other header case, unknown parameters and a preamble is understood', async () => {
    const body =
      'preamble\n--b\nX-Other: 1\ncontent-DISPOSITION: form-data; size="3"; x="y"; name=n\n\nabc\n--b--';
    const parts = await collect(readDownload(cutUp(Buffer.from(body), 1), 'b'));
    expect(parts).toEqual([{ params: { size: '3', x: 'y', name: 'n' }, bytes: Buffer.from('abc') }]);
  });

  test('a part without size has no bytes, and what follows is skipped up to the boundary', async () => {
    const body =
      '--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nskipped\r\n--b\r\nContent-Disposition: form-data; name="c"; size="1"\r\n\r\nx\r\n--b--\r\n';
    const parts = await collect(readDownload(cutUp(Buffer.from(body), 3), 'b'));
    expect(parts.map((part) => [part.params['name'], part.bytes.toString()])).toEqual([
      ['a', ''],
      ['c', 'x'],
    ]);
  });

  test('cut anywhere is data_loss', async () => {
    const body = Buffer.concat([
      downloadPartHead(record({ size: 5 }), B),
      Buffer.from('12345\r\n'),
      downloadTail(B),
    ]);
    // Without its last two bytes, the line end after the final boundary, it is whole.
    for (let length = 0; length < body.length - 2; length += 1) {
      await expect(collect(readDownload(cutUp(body.subarray(0, length), 64), B))).rejects.toMatchObject({
        code: 'data_loss',
        retryable: true,
      });
    }
    expect(await collect(readDownload(cutUp(body.subarray(0, body.length - 2), 64), B))).toHaveLength(1);
  });

  test.each([
    ['a part longer than its size', 'Content-Disposition: form-data; size="2"\r\n\r\nabc\r\n--b--', /longer/],
    [
      'a part shorter than its size',
      'Content-Disposition: form-data; size="9"\r\n\r\nabc\r\n--b--\r\n',
      /longer|end/,
    ],
    ['a size that is no number', 'Content-Disposition: form-data; size="-1"\r\n\r\n\r\n--b--', /size/],
    ['no disposition', 'Content-Type: text/plain\r\n\r\n\r\n--b--', /Content-Disposition/],
    ['a header without colon', 'nonsense\r\n\r\n\r\n--b--', /colon/],
    ['endless headers', `X: ${'y'.repeat(17_000)}\r\n\r\n\r\n--b--`, /16384/],
  ])('%s is data_loss', async (_name, rest, message) => {
    const body = Buffer.from(`--b\r\n${rest}`);
    await expect(collect(readDownload(cutUp(body, 7), 'b'))).rejects.toMatchObject({
      code: 'data_loss',
      message: expect.stringMatching(message) as string,
    });
  });

  test('what is not pulled of a part is skipped, and leaving early ends the source', async () => {
    const head = (name: string): Buffer => downloadPartHead(record({ name, size: 100_000 }), B);
    const body = Buffer.concat([
      head('a'),
      randomBytes(100_000),
      Buffer.from('\r\n'),
      head('b'),
      randomBytes(100_000),
      Buffer.from('\r\n'),
      downloadTail(B),
    ]);
    let ended = false;
    async function* source(): AsyncGenerator<Uint8Array> {
      try {
        yield* cutUp(body, 1000);
      } finally {
        ended = true;
      }
    }
    const names: (string | undefined)[] = [];
    for await (const part of readDownload(source(), B)) {
      names.push(part.params.get('name'));
      await part.pull();
      if (names.length === 2) break;
    }
    expect(names).toEqual(['a', 'b']);
    expect(ended).toBe(true);
  });

  test('the boundary is whatever follows `boundary=`, and nothing else is a download', () => {
    expect(downloadBoundary('multipart/form-data; boundary="q"; x')).toBe('"q"; x');
    for (const type of [
      null,
      'application/json',
      'multipart/form-data;boundary=x',
      'multipart/form-data; boundary=',
    ]) {
      expect(() => downloadBoundary(type)).toThrow('other storage error: Invalid content-type header');
    }
  });
});

describe('an upload', () => {
  test('has the lengths of the reference: 125 + name + type + bytes, and 109 + id + bytes', () => {
    const create = uploadEnvelope({ name: 'abc', dataType: 'de' }, 'boundary');
    expect(create.head.length + create.tail.length).toBe(125 + 3 + 2);
    const update = uploadEnvelope({ existingId: 'x'.repeat(36) }, 'boundary');
    expect(update.head.length + update.tail.length).toBe(109 + 36);
    expect(create.head.toString()).toBe(
      '--boundary\r\nContent-Type: application/octet-stream\r\nContent-Disposition: form-data; name="abc"; data-type="de"\r\n\r\n',
    );
  });

  test('with the fixed boundary ends at the last closing delimiter, cut into chunks anywhere', async () => {
    const nasty = fc.constantFrom(
      '\r\n--boundary--',
      '\r\n--boundary--\r\n',
      '\r\n--boundary\r\n',
      '--boundary--',
      '\r',
      '\n',
    );
    const payload = fc
      .array(
        fc.oneof(
          nasty.map((s) => Buffer.from(s)),
          fc.uint8Array({ maxLength: 40 }),
        ),
        { maxLength: 6 },
      )
      .map((pieces) => Buffer.concat(pieces));
    await fc.assert(
      fc.asyncProperty(payload, cuts(), async (bytes, cut) => {
        const { head, tail } = uploadEnvelope({ name: 'n', dataType: 't' }, 'boundary');
        const parts = await collect(readUpload(cutUp(Buffer.concat([head, bytes, tail]), cut), 'boundary'));
        expect(parts).toEqual([{ params: { name: 'n', 'data-type': 't' }, bytes }]);
      }),
    );
  });

  test('with a boundary of its own may have several parts', async () => {
    const payloads = [
      Buffer.from('\r\n--boundaries'),
      Buffer.alloc(0),
      Buffer.from(`\r\n--${B.slice(1)}`),
      Buffer.from(`\r\n--${B}x`),
    ];
    const body = Buffer.concat([
      ...payloads.flatMap((bytes, index) => [
        Buffer.from(
          `${index === 0 ? '' : '\r\n'}--${B}\r\nContent-Disposition: form-data; name="n${index}"\r\n\r\n`,
        ),
        bytes,
      ]),
      Buffer.from(`\r\n--${B}--\r\n`),
    ]);
    for (const cut of [1, 2, 7, 64, 10_000]) {
      const parts = await collect(readUpload(cutUp(body, cut), B));
      expect(parts.map((part) => part.bytes)).toEqual(payloads);
    }
  });

  test('whose own boundary occurs in the payload is refused, not cut short', async () => {
    const { head, tail } = uploadEnvelope({ name: 'n', dataType: 't' }, B);
    const body = Buffer.concat([head, Buffer.from(`before\r\n--${B}--\r\nafter`), tail]);
    await expect(collect(readUpload(cutUp(body, 50), B))).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('occurs in the payload') as string,
    });
  });

  test.each(['boundary', B])('cut anywhere is refused (boundary %s)', async (boundary) => {
    const { head, tail } = uploadEnvelope({ name: 'n', dataType: 't' }, boundary);
    const body = Buffer.concat([head, Buffer.from('payload'), tail]);
    for (let length = 0; length < body.length - 2; length += 1) {
      await expect(collect(readUpload(cutUp(body.subarray(0, length), 64), boundary))).rejects.toMatchObject({
        code: 'invalid_argument',
      });
    }
    expect(await collect(readUpload(cutUp(body.subarray(0, body.length - 2), 64), boundary))).toHaveLength(1);
  });

  test('takes its boundary from the content type, quoted or not', () => {
    expect(uploadBoundary('multipart/form-data; boundary=boundary')).toBe('boundary');
    expect(uploadBoundary('multipart/form-data;boundary="a b"')).toBe('a b');
    expect(uploadBoundary('Multipart/Form-Data; charset=utf-8; boundary=x; y=z')).toBe('x');
    for (const type of [
      null,
      'application/json',
      'multipart/form-data',
      `multipart/form-data; boundary=${'x'.repeat(201)}`,
    ]) {
      expect(() => uploadBoundary(type)).toThrow(/boundary of at most 200/);
    }
  });
});

function record(values: Partial<DataRecord>): DataRecord {
  return {
    id: '2f9f7a0e-0000-4000-8000-000000000001',
    domain_id: '9c0c7a0e-0000-4000-8000-000000000002',
    name: 'name',
    data_type: 'type',
    size: 0,
    created_at: '2026-05-01T10:00:00.123Z',
    updated_at: '2026-05-01T10:00:01.000Z',
    digest: `sha256:${'0'.repeat(64)}`,
    ...values,
  };
}

function cuts(): fc.Arbitrary<number> {
  return fc.oneof(fc.constantFrom(1, 2, 3), fc.integer({ min: 4, max: 200 }), fc.constant(1_000_000));
}

async function* cutUp(bytes: Uint8Array, size: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

async function collect(
  parts: AsyncIterable<MultipartPart>,
): Promise<{ params: Record<string, string>; bytes: Buffer }[]> {
  const result: { params: Record<string, string>; bytes: Buffer }[] = [];
  for await (const part of parts) {
    const chunks: Uint8Array[] = [];
    for (let chunk = await part.pull(); chunk !== null; chunk = await part.pull()) chunks.push(chunk);
    result.push({ params: Object.fromEntries(part.params), bytes: Buffer.concat(chunks) });
  }
  return result;
}
