import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { UPPER_IMAGE, zip } from './image.test.support.ts';
import { mountPath, openImage } from './image.ts';

const LIMITS = { maxImageBytes: 1_000_000, maxModuleBytes: 1_000_000 };
let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-image-'));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const upper = (): Promise<Buffer> => readFile(path.join(UPPER_IMAGE, 'upper.wasm'));
async function file(name: string, content: Uint8Array | string): Promise<string> {
  const target = path.join(dir, name);
  await mkdir(path.dirname(target), { recursive: true });
  await writeFile(target, content);
  return target;
}

const manifest = (members: object): string =>
  JSON.stringify({
    id: 'x',
    name: 'tools',
    'entry-points': [{ id: 'up', 'wasm-path': 'bin/upper.wasm' }],
    ...members,
  });
/** An archive with that manifest and `bin/upper.wasm`. */
const packed = async (text: string): Promise<string> =>
  file(
    'image.zip',
    zip([
      { name: 'manifest.json', content: Buffer.from(text) },
      { name: 'bin/upper.wasm', content: await upper() },
    ]),
  );

describe('an image', () => {
  test('is an archive with a manifest, which names programs and folders', async () => {
    const text = manifest({
      'mount-points': [{ ro: 'input' }, { rw: '/data/out/' }, { wo: '/log' }],
      more: 1,
    });
    const image = await openImage(await packed(text), LIMITS);
    expect(image).toMatchObject({ name: 'tools', entryPoints: ['up'] });
    expect(image.mounts).toEqual([
      { path: '/input', writable: false },
      { path: '/data/out', writable: true },
      { path: '/log', writable: true },
    ]);
    const program = await image.module('up');
    expect(program?.calledAs).toBe('bin/upper.wasm');
    expect(program?.bytes).toEqual(await upper());
    expect(await image.module('bin/upper.wasm')).toBeNull();
  });

  test('is a folder, with or without a manifest', async () => {
    const described = await openImage(UPPER_IMAGE, LIMITS);
    expect(described).toMatchObject({ name: 'upper', entryPoints: ['upper'] });
    await file('plain/a.wasm', await upper());
    await file('plain/b.wasm', await upper());
    await file('plain/below/c.wasm', await upper());
    await symlink('/etc/passwd', path.join(dir, 'plain', 'd.wasm'));
    const plain = await openImage(path.join(dir, 'plain'), LIMITS);
    expect([...plain.entryPoints!].sort()).toEqual(['a', 'b']);
    expect(plain.mounts).toEqual([
      { path: '/in', writable: false },
      { path: '/out', writable: true },
    ]);
    expect((await plain.module('a'))?.calledAs).toBe('a');
  });

  test('is a single module, which runs whatever it is called by', async () => {
    const image = await openImage(await file('anything', await upper()), LIMITS);
    expect(image.entryPoints).toBeNull();
    expect((await image.module('tool'))?.calledAs).toBe('tool');
  });

  test.each([
    ['that is no JSON', '{', 'manifest.json is not JSON'],
    ['without a name', JSON.stringify({ id: 'x' }), 'manifest.json: name'],
    ['without programs', manifest({ 'entry-points': [] }), 'at least one of entry-points'],
    [
      'with a program that is not there',
      manifest({ 'entry-points': [{ id: 'a', 'wasm-path': 'a.wasm' }] }),
      '"a.wasm" of entry point "a" is not in the image',
    ],
    [
      'with a program outside',
      manifest({ 'entry-points': [{ id: 'a', 'wasm-path': '../a.wasm' }] }),
      'is not in the image',
    ],
    [
      'with a name twice',
      manifest({ 'entry-points': ['a', 'a'].map((id) => ({ id, 'wasm-path': 'bin/upper.wasm' })) }),
      'two entry points have the id "a"',
    ],
    ['with a folder twice', manifest({ 'mount-points': [{ ro: '/a' }, { rw: 'a/' }] }), '/a is given twice'],
    [
      'with a folder in another',
      manifest({ 'mount-points': [{ ro: '/a' }, { rw: '/a/b' }] }),
      'or holds another',
    ],
    [
      'with a folder that goes up',
      manifest({ 'mount-points': [{ rw: '/a/../../etc' }] }),
      'must be a folder below /',
    ],
    ['with everything as a folder', manifest({ 'mount-points': [{ rw: '/' }] }), 'must be a folder below /'],
    ['with another kind of folder', manifest({ 'mount-points': [{ tmp: '/a' }] }), 'mount-points.0'],
  ])('with a manifest %s is refused', async (_name, text, message) => {
    const image = await packed(text);
    await expect(openImage(image, LIMITS)).rejects.toThrow(message);
    await expect(openImage(image, LIMITS)).rejects.toThrow(`image ${image}: `);
  });

  test('that is none is refused', async () => {
    await expect(openImage(path.join(dir, 'absent'), LIMITS)).rejects.toMatchObject({ code: 'not_found' });
    await expect(openImage(await file('text', 'hello'), LIMITS)).rejects.toThrow(
      'neither a folder, nor a zip archive',
    );
    await mkdir(path.join(dir, 'empty'));
    await expect(openImage(path.join(dir, 'empty'), LIMITS)).rejects.toThrow(
      'neither a manifest.json nor a file NAME.wasm',
    );
  });

  test('may be as large as its limits, and not a byte larger', async () => {
    const bytes = await upper();
    const single = await file('a.wasm', bytes);
    await openImage(single, { ...LIMITS, maxImageBytes: bytes.length });
    await expect(openImage(single, { ...LIMITS, maxImageBytes: bytes.length - 1 })).rejects.toThrow(
      'over the limit maxImageBytes',
    );
    const archive = await packed(manifest({}));
    const image = await openImage(archive, { ...LIMITS, maxModuleBytes: bytes.length - 1 });
    await expect(image.module('up')).rejects.toThrow(`over the limit of ${bytes.length - 1}`);
  });
});

test('a folder of a program is a normal path below /', () => {
  expect(['in', '/in/', '//a//b'].map(mountPath)).toEqual(['/in', '/in', '/a/b']);
  expect(() => mountPath('a\0b')).toThrow('must be a folder below /');
});
