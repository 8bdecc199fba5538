/** Up and down through a real dispatcher on loopback. */
import { createHash, randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, readFile, readdir, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Readable } from 'node:stream';
import { openDispatcher, openFileBlobs, openSqliteStore } from '@millrace/dispatch';
import { connect, type Requestor } from '@millrace/dispatch/client';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { dataTypeOf, safeRelativePath, saveArtifacts, uniqueDataName, uploadInput } from './transfer.ts';

let root: string;
let requestor: Requestor;
let domainId: string;
const closing: (() => PromiseLike<unknown>)[] = [];

beforeAll(async () => {
  root = await mkdtemp(path.join(tmpdir(), 'millrace-transfer-'));
  closing.push(() => rm(root, { recursive: true, force: true }));
  const store = await openSqliteStore({ path: path.join(root, 'db') });
  closing.push(() => store[Symbol.asyncDispose]());
  const blobs = await openFileBlobs({ dir: path.join(root, 'blobs') });
  closing.push(() => blobs[Symbol.asyncDispose]());
  const dispatcher = await openDispatcher({ store, blobs, port: 0, limits: { partBytes: 1024 * 1024 } });
  closing.push(() => dispatcher.close());
  domainId = dispatcher.defaultDomainId;
  requestor = connect({ url: dispatcher.url, token: await dispatcher.issueClientToken() });
  closing.push(() => requestor.close());
});
afterAll(async () => {
  for (const close of closing.toReversed()) await close();
});

const signal = new AbortController().signal;
const to = () => ({ requestor, domainId, signal });
const from = () => ({ storage: requestor.storage, domainId, signal });
const sha256 = (bytes: Uint8Array): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

/** `bytes` in chunks that fit no block size. */
async function* chunked(bytes: Uint8Array, size = 65_521): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

const MIB = 1024 * 1024;

describe('an upload', () => {
  test.each([0, 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 11 * MIB])(
    'of %d bytes comes back as it was',
    async (size) => {
      const bytes = randomBytes(size);
      const id = await requestor.upload(chunked(bytes), { name: uniqueDataName('a.bin') });
      const out = path.join(root, `out-${size}`);
      const { saved } = await saveArtifacts([{ path: 'deep/er/a.bin', id, taskId: 't' }], out, from());
      expect(saved[0]).toMatchObject({ size, digest: sha256(bytes), file: path.join(out, 'deep/er/a.bin') });
      expect((await readFile(path.join(out, 'deep/er/a.bin'))).equals(bytes)).toBe(true);
      expect(await readdir(path.join(out, 'deep/er'))).toEqual(['a.bin']);
    },
  );

  test('of a file keeps its extension in the name and its type', async () => {
    const file = path.join(root, 'Ein Föto (1).JPG');
    await writeFile(file, 'x');
    const id = await uploadInput({ kind: 'file', path: file }, Readable.from([]), to());
    const item = await requestor.storage.get(domainId, id);
    expect(item).toMatchObject({ data_type: 'jpg_data', size: 1 });
    expect(item?.name).toMatch(/^Ein_F_to__1_-[0-9a-f]{32}\.JPG$/);
  });

  test('of a file that is there already sends nothing and gives the same id', async () => {
    const bytes = randomBytes(9 * MIB);
    const [one, two] = [path.join(root, 'same.bin'), path.join(root, 'other', 'same.bin')];
    await mkdir(path.dirname(two));
    await Promise.all([writeFile(one, bytes), writeFile(two, bytes)]);
    const sent: number[] = [];
    const counting = { ...to(), onBytes: (total: number) => void sent.push(total) };
    const id = await uploadInput({ kind: 'file', path: one }, Readable.from([]), counting);
    expect(sent.at(-1)).toBe(bytes.length);
    sent.length = 0;
    expect(await uploadInput({ kind: 'file', path: two }, Readable.from([]), counting)).toBe(id);
    expect(sent).toEqual([]);
  });

  test('of the same new file by two at once gives both the same id', async () => {
    const file = path.join(root, 'race.bin');
    await writeFile(file, randomBytes(1000));
    const upload = () => uploadInput({ kind: 'file', path: file }, Readable.from([]), to());
    const [one, two] = await Promise.all([upload(), upload()]);
    expect(one).toBe(two);
  });

  test.each([100, 9 * MIB])(
    'of %d bytes that are not what was announced is refused and not kept',
    async (size) => {
      const name = uniqueDataName('changed.bin');
      const upload = requestor.upload(chunked(randomBytes(size)), { name, sha256: '0'.repeat(64) });
      await expect(upload).rejects.toMatchObject({ code: 'failed_precondition' });
      expect(await requestor.storage.find(domainId, { name })).toEqual([]);
    },
  );

  test('that waits for a silent pipe ends with the signal, by its reason', async () => {
    const stop = new AbortController();
    const silent = new Readable({ read() {} });
    const upload = uploadInput({ kind: 'stdin' }, silent, { ...to(), signal: stop.signal });
    const reason = new Error('stop it');
    stop.abort(reason);
    await expect(upload).rejects.toBe(reason);
    expect(silent.destroyed).toBe(true);
  });
});

describe('saving artifacts', () => {
  const put = (text: string): Promise<string> =>
    requestor.upload(chunked(Buffer.from(text)), { name: uniqueDataName('a.txt') });

  test('writes nothing when one path is refused', async () => {
    const id = await put('x');
    const out = path.join(root, 'refused');
    const artifacts = [
      { path: 'fine.txt', id, taskId: 't' },
      { path: 'a/../../evil.txt', id, taskId: 't' },
    ];
    await expect(saveArtifacts(artifacts, out, from())).rejects.toThrow(
      /"a\/..\/..\/evil.txt" is refused: it contains ".."/,
    );
    await expect(readdir(out)).rejects.toThrow(/ENOENT/);
  });

  test('skips a file that is also the folder of others, and the second of two that are one file', async () => {
    const out = path.join(root, 'clash');
    const paths = ['f', 'f/x', 'f/y/z', 'f/y', 'g', './g'];
    const artifacts = await Promise.all(
      paths.map(async (each) => ({ path: each, id: await put(each), taskId: 't' })),
    );
    for (const order of [artifacts, artifacts.slice(0, 4).toReversed().concat(artifacts.slice(4))]) {
      await rm(out, { recursive: true, force: true });
      const { saved, skipped } = await saveArtifacts(order, out, from());
      expect(saved.map((each) => each.path).toSorted()).toEqual(['f/x', 'f/y/z', 'g']);
      expect(await readFile(path.join(out, 'f/x'), 'utf8')).toBe('f/x');
      expect(await readFile(path.join(out, 'g'), 'utf8')).toBe('g');
      expect(new Map(skipped.map((each) => [each.path, each.reason]))).toEqual(
        new Map([
          ['f', expect.stringMatching(/^it is also the folder of "f\/(x|y|y\/z)"$/)],
          ['f/y', 'it is also the folder of "f/y/z"'],
          ['./g', 'it is the same file as "g"'],
        ]),
      );
    }
  });

  test('does not follow a link out of the folder', async () => {
    const out = path.join(root, 'linked');
    const outside = path.join(root, 'outside');
    await mkdir(out);
    await mkdir(outside);
    await symlink(outside, path.join(out, 'way'));
    const artifacts = [{ path: 'way/deeper/evil.txt', id: await put('x'), taskId: 't' }];
    await expect(saveArtifacts(artifacts, out, from())).rejects.toThrow(
      /is a link that leaves the output folder/,
    );
    expect(await readdir(outside)).toEqual([]);
  });

  test('replaces a file, and a link in its place, without writing through it', async () => {
    const out = path.join(root, 'replaced');
    const kept = path.join(root, 'kept.txt');
    await mkdir(out);
    await writeFile(kept, 'mine');
    await symlink(kept, path.join(out, 'a.txt'));
    await saveArtifacts([{ path: 'a.txt', id: await put('theirs'), taskId: 't' }], out, from());
    expect(await readFile(path.join(out, 'a.txt'), 'utf8')).toBe('theirs');
    expect(await readFile(kept, 'utf8')).toBe('mine');
  });

  test('of something that is gone says so and leaves no piece behind', async () => {
    const out = path.join(root, 'gone');
    const id = '00000000-0000-4000-8000-000000000000';
    await expect(saveArtifacts([{ path: 'a.txt', id, taskId: 't' }], out, from())).rejects.toMatchObject({
      code: 'not_found',
    });
    expect(await readdir(out)).toEqual([]);
  });
});

describe('a logical path', () => {
  test.each([
    ['a/b.txt', path.join('a', 'b.txt')],
    ['./a//b/', path.join('a', 'b')],
    ['..a/b..', path.join('..a', 'b..')],
  ])('%s is %s here', (logical, local) => {
    expect(safeRelativePath(logical)).toBe(local);
  });

  test.each(['', '.', '/', '/etc/passwd', '..', 'a/..', '../a', 'a/../../b', 'C:\\x', '\\\\host\\x', 'a\0b'])(
    '%j is refused',
    (logical) => {
      expect(() => safeRelativePath(logical)).toThrow(/is refused: it/);
    },
  );
});

test.each([
  ['a.json', 'json'],
  ['a.DRC', 'ply_draco'],
  ['a.tar.gz', 'gz_data'],
  ['a', 'binary'],
  ['.env', 'binary'],
])('the data type of %s is %s', (name, type) => {
  expect(dataTypeOf(name)).toBe(type);
});

test('a data name is at most 128 bytes, whatever the file is called', () => {
  const name = uniqueDataName(`${'ü'.repeat(300)}.${'x'.repeat(300)}`);
  expect(Buffer.byteLength(name)).toBeLessThanOrEqual(128);
  expect(name).toMatch(/^[\w.-]+$/);
});
