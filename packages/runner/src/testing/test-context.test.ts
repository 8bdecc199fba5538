import { mkdir, mkdtemp, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';
import * as fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { MillraceError, TaskAbort } from '../errors.ts';
import type { ErrorCode } from '../errors.ts';
import { artifactName, dataTypeOf, logicalPath, materializedPath } from './artifact-names.ts';
import { createTestContext } from './test-context.ts';
import type { TestContextOptions } from './test-context.ts';

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);
const text = (bytes: Uint8Array | undefined): string => new TextDecoder().decode(bytes);

async function code(promise: Promise<unknown>): Promise<ErrorCode> {
  const error: unknown = await promise.then(
    () => new Error('resolved'),
    (reason: unknown) => reason,
  );
  if (MillraceError.is(error)) return error.code;
  throw error;
}

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-test-context-'));
});
afterEach(() => rm(folder, { recursive: true }));

describe('the lease', () => {
  test('lists all inputs and has what a runner may need', () => {
    const { lease } = createTestContext({ inputs: { b: '1', a: '2' }, task: { meta: { size: 3 } } });
    expect(lease.task.inputs_cids).toEqual(['b', 'a']);
    expect(lease.task.meta).toEqual({ size: 3 });
    expect(lease.task.outputs_prefix).toBeNull();
    expect(lease.domain_id).not.toBeNull();
  });

  test('that no dispatcher could send is refused', () => {
    expect(() => createTestContext({ task: { attempts: -1 } })).toThrow(/lease.task.attempts/);
    expect(() => createTestContext({ lease: { domain_id: 'x' } })).toThrow(/lease.domain_id/);
  });
});

describe('inputs', () => {
  test('are read whole, as a stream, and from disk', async () => {
    await using ctx = createTestContext({ inputs: { a: 'héllo', b: Uint8Array.of(1, 2) } });
    expect(text(await ctx.input.getBytesByCid('a'))).toBe('héllo');
    expect(await ctx.input.getBytesByCid(' b ')).toEqual(Uint8Array.of(1, 2));
    const chunks = await (await ctx.input.openRead('a')).toArray();
    expect(Buffer.concat(chunks as Uint8Array[]).toString()).toBe('héllo');
    expect(await readFile(await ctx.input.materializeCidToTemp('a'), 'utf8')).toBe('héllo');
  });

  test('have the metadata and the layout on disk of a node', async () => {
    const ctx = createTestContext({
      inputs: {
        scan: [
          { content: 'one', name: 'dmt_manifest_2024-01-02_03-04-05', data_type: 'dmt_manifest_json' },
          { content: 'two', name: 'photo.CSV' },
        ],
      },
    });
    const input = await ctx.input.materializeCidWithMeta('scan');
    expect(input).toMatchObject({
      cid: 'scan',
      data_id: 'scan',
      name: 'dmt_manifest_2024-01-02_03-04-05',
      data_type: 'dmt_manifest_json',
      domain_id: ctx.lease.domain_id,
      extracted_paths: [],
    });
    expect(input.path).toBe(
      join(input.root_dir, 'datasets/2024-01-02_03-04-05/dmt_manifest_2024-01-02_03-04-05.dmt_manifest_json'),
    );
    expect(input.related_files).toEqual([join(input.root_dir, 'datasets/photo_CSV/photo_CSV.csv')]);
    expect(await readFile(input.related_files[0]!, 'utf8')).toBe('two');
    const second = await ctx.input.materializeCidWithMeta('scan');
    expect(second.root_dir).not.toBe(input.root_dir);
    await ctx.close();
    for (const root of [input.root_dir, second.root_dir]) await expect(stat(root)).rejects.toThrow('ENOENT');
  });

  test('come from every file of a folder', async () => {
    await mkdir(join(folder, 'deep/er'), { recursive: true });
    await writeFile(join(folder, 'deep/er/b.json'), '{}');
    await writeFile(join(folder, 'a.txt'), 'from disk');
    await using ctx = createTestContext({ inputsDir: folder, inputs: { c: 'from memory' } });
    expect(ctx.lease.task.inputs_cids).toEqual(['a.txt', 'deep/er/b.json', 'c']);
    expect(text(await ctx.input.getBytesByCid('a.txt'))).toBe('from disk');
    const { path, data_type } = await ctx.input.materializeCidWithMeta('deep/er/b.json');
    await writeFile(path, 'spoiled');
    expect(data_type).toBe('json');
    expect(text(await ctx.input.getBytesByCid('deep/er/b.json'))).toBe('{}');
    expect(() => createTestContext({ inputsDir: join(folder, 'a.txt') })).toThrow(
      /must be an existing folder/,
    );
  });

  test('cannot be changed by who reads them', async () => {
    const original = Uint8Array.of(1, 2, 3);
    await using ctx = createTestContext({ inputs: { a: original } });
    (await ctx.input.getBytesByCid('a')).fill(9);
    for await (const chunk of await ctx.input.openRead('a')) (chunk as Uint8Array).fill(9);
    original.fill(8);
    expect(await ctx.input.getBytesByCid('a')).toEqual(Uint8Array.of(1, 2, 3));
  });

  test('that are unknown, blank or foreign are refused', async () => {
    await using ctx = createTestContext({ inputs: { a: 'x' } });
    const { domain_id: domain, domain_server_url: server } = ctx.lease;
    expect(await code(ctx.input.getBytesByCid('nope'))).toBe('not_found');
    expect(await code(ctx.input.openRead('  '))).toBe('invalid_argument');
    expect(await code(ctx.input.openRead('http://[bad'))).toBe('invalid_argument');
    expect(await code(ctx.input.materializeCidToTemp('https://evil.example/a'))).toBe('permission_denied');
    expect(await code(ctx.input.openRead(`${server}/api/v1/domains/other/data/a`))).toBe('permission_denied');
    for (const cid of [
      `${server}/api/v1/domains/${domain}/data/a`,
      `/api/v1/domains/${domain}/data?ids=a`,
      `/api/v1/domains/${domain}/data/a?raw=true`,
    ]) {
      expect(text(await ctx.input.getBytesByCid(cid))).toBe('x');
    }
    expect(() => createTestContext({ inputs: { a: [] } })).toThrow(/at least one part/);
  });

  test('stream with backpressure, and an empty one ends', async () => {
    await using ctx = createTestContext({ inputs: { big: new Uint8Array(4 << 20).fill(7), empty: '' } });
    const stream = await ctx.input.openRead('big');
    const first = stream.read(1) as Uint8Array;
    expect(first[0]).toBe(7);
    for (let turns = 0; turns < 20; turns += 1) await turn();
    expect(stream.readableLength).toBeLessThan(256 * 1024);
    let size = 1;
    for await (const chunk of stream) size += (chunk as Uint8Array).length;
    expect(size).toBe(4 << 20);
    expect(await (await ctx.input.openRead('empty')).toArray()).toEqual([]);
  });

  test('end with the reason when their own signal aborts', async () => {
    await using ctx = createTestContext({ inputs: { big: new Uint8Array(4 << 20) } });
    const controller = new AbortController();
    const stream = await ctx.input.openRead('big', { signal: controller.signal });
    const reason = new Error('not needed any more');
    controller.abort(reason);
    await expect(stream.toArray()).rejects.toBe(reason);
    await expect(ctx.input.getBytesByCid('big', { signal: controller.signal })).rejects.toBe(reason);
    expect(ctx.signal.aborted).toBe(false);
  });
});

describe.each(['memory', 'a folder'])('artifacts in %s', (where) => {
  const create = (options: TestContextOptions = {}): ReturnType<typeof createTestContext> =>
    createTestContext({ ...(where === 'memory' ? {} : { outputsDir: join(folder, 'out') }), ...options });

  test('are kept by logical path, with a record each', async () => {
    await using ctx = create({ task: { outputs_prefix: '/out/' } });
    const file = join(folder, 'source.bin');
    await writeFile(file, 'file');
    await ctx.output.putBytes('/a/b.json', utf8('bytes'));
    await ctx.output.putFile('f', file);
    await ctx.output.putStream('s.tar.gz', [utf8('str'), utf8('eam')].values() as never);
    const upload = await ctx.output.openMultipart('m.png');
    expect(ctx.openUploads).toBe(1);
    const chunk = utf8('multi');
    await upload.writeChunk(chunk);
    chunk.fill(0);
    await upload.writeChunk(utf8('part'));
    expect(ctx.outputs.has('out/m.png')).toBe(false);
    await upload.finish();
    expect(ctx.openUploads).toBe(0);
    const id = await ctx.output.putDomainArtifact({
      rel_path: 'd',
      name: 'my name',
      data_type: 'my_type',
      content: { bytes: utf8('domain') },
    });
    expect([...ctx.outputs].map(([path, bytes]) => [path, text(bytes)])).toEqual([
      ['out/a/b.json', 'bytes'],
      ['out/f', 'file'],
      ['out/s.tar.gz', 'stream'],
      ['out/m.png', 'multipart'],
      ['out/d', 'domain'],
    ]);
    expect([...ctx.outputs.keys()]).toEqual([...ctx.outputs.entries()].map(([path]) => path));
    expect(ctx.outputs.size).toBe([...ctx.outputs.values()].length);
    const seen: string[] = [];
    ctx.outputs.forEach((_, path) => seen.push(path));
    expect(seen).toHaveLength(5);
    const task = ctx.lease.task.id;
    expect(ctx.artifacts.map(({ name, data_type }) => [name, data_type])).toEqual([
      [`out_a_b_json_${task}`, 'json'],
      [`out_f_${task}`, 'binary'],
      [`out_s_tar_gz_${task}`, 'gz_data'],
      [`out_m_png_${task}`, 'png_data'],
      ['my name', 'my_type'],
    ]);
    expect(ctx.artifacts.at(-1)?.id).toBe(id);
    expect(new Set(ctx.artifacts.map((artifact) => artifact.id)).size).toBe(5);
  });

  test('uploaded twice to one path are replaced and reported once', async () => {
    await using ctx = create();
    await ctx.output.putBytes('a', utf8('first, longer'));
    const [{ id } = { id: '' }] = ctx.artifacts;
    await ctx.output.putBytes('a', utf8('second'));
    expect(text(ctx.outputs.get('a'))).toBe('second');
    expect(ctx.artifacts).toMatchObject([{ logical_path: 'a', id }]);
  });

  test('may be empty', async () => {
    await using ctx = create();
    await ctx.output.putBytes('a', new Uint8Array());
    await (await ctx.output.openMultipart('b')).finish();
    expect(ctx.outputs.get('a')).toEqual(new Uint8Array());
    expect(ctx.outputs.get('b')).toEqual(new Uint8Array());
    expect(ctx.outputs.get('c')).toBeUndefined();
  });

  test('whose upload fails or is aborted do not exist, and leave nothing behind', async () => {
    await using ctx = create();
    const broken = async function* (): AsyncGenerator<Uint8Array> {
      yield utf8('half');
      throw new Error('source broke');
    };
    await expect(ctx.output.putStream('a', broken())).rejects.toThrow('source broke');
    const upload = await ctx.output.openMultipart('b');
    await upload.writeChunk(utf8('half'));
    await upload.abort();
    expect(ctx.outputs.size).toBe(0);
    expect(ctx.artifacts).toEqual([]);
    if (where === 'a folder') expect(await readdir(join(folder, 'out'))).toEqual([]);
  });

  test('are pulled from their stream one chunk at a time', async () => {
    await using ctx = create();
    let made = 0;
    let open = 0;
    const source = async function* (): AsyncGenerator<Uint8Array> {
      for (; made < 100; made += 1) {
        open += 1;
        yield new Uint8Array(64 * 1024);
        open -= 1;
        if (made === 50) expect(ctx.outputs.size).toBe(0);
        expect(open).toBeLessThan(3);
      }
    };
    await ctx.output.putStream('a', source());
    expect(ctx.outputs.get('a')).toHaveLength(100 * 64 * 1024);
  });
});

describe('the contract of artifacts', () => {
  test('the path of the prefix alone is one, and nothing at all is none', async () => {
    await using ctx = createTestContext({ task: { outputs_prefix: '/out/' } });
    await ctx.output.putBytes('/', utf8('x'));
    expect([...ctx.outputs.keys()]).toEqual(['out']);
    for (const outputs_prefix of [null, '', '/']) {
      await using bare = createTestContext({ task: { outputs_prefix } });
      for (const path of ['', '/']) {
        expect(await code(bare.output.putBytes(path, utf8('x')))).toBe('invalid_argument');
      }
    }
  });

  test('a path has up to 1024 bytes, without the slashes in front and without the prefix', async () => {
    await using ctx = createTestContext({ task: { outputs_prefix: 'out' } });
    const longest = 'ä'.repeat(512);
    await ctx.output.putBytes(`//${longest}`, utf8('x'));
    expect([...ctx.outputs.keys()]).toEqual([`out/${longest}`]);
    expect(await code(ctx.output.putBytes(`${longest}x`, utf8('x')))).toBe('invalid_argument');
  });

  test.each(['a//b', 'a/', '..', '../a', 'a/../b', 'a/./b', '.', 'a\u0000b', 'a\nb', 'a\u009b', 'a\\b', 7])(
    'the path %j is refused by every method',
    async (path) => {
      await using ctx = createTestContext({ task: { outputs_prefix: 'out' } });
      const at = path as string;
      for (const attempt of [
        ctx.output.putBytes(at, utf8('x')),
        ctx.output.putStream(at, new Blob(['x']).stream() as never),
        ctx.output.openMultipart(at),
        ctx.output.putDomainArtifact({
          rel_path: at,
          name: 'n',
          data_type: 't',
          content: { bytes: utf8('x') },
        }),
      ]) {
        expect(await code(attempt)).toBe('invalid_argument');
      }
      expect(ctx.outputs.size).toBe(0);
    },
  );

  test('an upload takes nothing after it has ended', async () => {
    await using ctx = createTestContext();
    const finished = await ctx.output.openMultipart('a');
    await finished.finish();
    const aborted = await ctx.output.openMultipart('b');
    await aborted.abort();
    for (const upload of [finished, aborted]) {
      expect(await code(upload.writeChunk(utf8('x')))).toBe('failed_precondition');
      expect(await code(upload.finish())).toBe('failed_precondition');
      expect(await code(upload.abort())).toBe('failed_precondition');
    }
    expect([...ctx.outputs.keys()]).toEqual(['a']);
  });

  test('chunks of one upload are written one after the other', async () => {
    await using ctx = createTestContext();
    const upload = await ctx.output.openMultipart('a');
    const first = upload.writeChunk(utf8('1'));
    expect(await code(upload.writeChunk(utf8('2')))).toBe('failed_precondition');
    await first;
    await upload.writeChunk(utf8('3'));
    await upload.finish();
    expect(text(ctx.outputs.get('a'))).toBe('13');
  });

  test('anything but bytes is refused', async () => {
    await using ctx = createTestContext();
    expect(await code(ctx.output.putBytes('a', 'text' as never))).toBe('invalid_argument');
    expect(await code(ctx.output.putStream('a', ['text'].values() as never))).toBe('invalid_argument');
    const upload = await ctx.output.openMultipart('a');
    expect(await code(upload.writeChunk([1] as never))).toBe('invalid_argument');
    expect(await code(ctx.output.putFile('a', join(folder, 'missing')))).toBe('not_found');
    expect(await code(ctx.output.putFile('a', folder))).toBe('not_found');
    expect(ctx.outputs.size).toBe(0);
  });

  test('name and type of a domain artifact are 1 to 128 bytes', async () => {
    await using ctx = createTestContext();
    const put = (name: string, data_type: string): Promise<string | null> =>
      ctx.output.putDomainArtifact({ rel_path: 'a', name, data_type, content: { bytes: utf8('x') } });
    await put('n'.repeat(128), 't'.repeat(128));
    for (const [name, type] of [
      ['', 't'],
      ['n', ''],
      ['n'.repeat(129), 't'],
      ['ä'.repeat(65), 't'],
      ['n', 't'.repeat(129)],
    ] as const) {
      expect(await code(put(name, type))).toBe('invalid_argument');
    }
  });

  test('existing_id must exist, and the record keeps it', async () => {
    await using ctx = createTestContext({ inputs: { known: 'x' } });
    const put = (existing_id: string): Promise<string | null> =>
      ctx.output.putDomainArtifact({
        rel_path: existing_id,
        name: 'n',
        data_type: 't',
        existing_id,
        content: { stream: new Blob(['x']).stream() as never },
      });
    expect(await put('known')).toBe('known');
    expect(await code(put('unknown'))).toBe('not_found');
    await ctx.output.putBytes('a', utf8('x'));
    expect(await put(ctx.artifacts.at(-1)!.id)).toBe(ctx.artifacts[1]!.id);
  });
});

describe('the control plane and the log', () => {
  test('record values as the wire would carry them', async () => {
    await using ctx = createTestContext();
    const value = { done: 1 };
    await ctx.ctrl.progress(value);
    value.done = 2;
    await ctx.ctrl.progress(value);
    await ctx.ctrl.logEvent(['x', null]);
    expect(ctx.progressValues).toEqual([{ done: 1 }, { done: 2 }]);
    expect(ctx.events).toEqual([['x', null]]);
    ctx.log.child({ tile: 3 }).child({ part: 1 }).warn('slow', { ms: 7 });
    ctx.log.debug('plain');
    expect(ctx.logs).toEqual([
      { level: 'warn', message: 'slow', fields: { tile: 3, part: 1, ms: 7 } },
      { level: 'debug', message: 'plain', fields: {} },
    ]);
    expect(ctx.calls.map(({ port, method }) => `${port}.${method}`)).toEqual([
      'ctrl.progress',
      'ctrl.progress',
      'ctrl.logEvent',
      'log.warn',
      'log.debug',
    ]);
  });

  test('refuse what is not JSON', async () => {
    await using ctx = createTestContext();
    const cycle: unknown[] = [];
    cycle.push({ cycle });
    for (const value of [
      undefined,
      NaN,
      Infinity,
      1n,
      () => 1,
      { a: undefined },
      new Date(0),
      new Map(),
      cycle,
    ]) {
      expect(await code(ctx.ctrl.progress(value as never))).toBe('invalid_argument');
      expect(await code(ctx.ctrl.logEvent({ value } as never))).toBe('invalid_argument');
      expect(() => ctx.log.info('x', { value } as never)).toThrow(MillraceError);
    }
    const shared = { a: 1 };
    await ctx.ctrl.progress([shared, shared, Object.create(null)]);
    expect(ctx.progressValues).toHaveLength(1);
  });

  test('any JSON goes through unchanged', async () => {
    await fc.assert(
      fc.asyncProperty(fc.jsonValue(), async (value) => {
        await using ctx = createTestContext();
        await ctx.ctrl.progress(value as never);
        expect(ctx.progressValues).toEqual([value]);
      }),
    );
  });

  test('the access token follows its rotation', () => {
    const ctx = createTestContext({ lease: { access_token: 'first' } });
    expect(ctx.accessToken.get()).toBe('first');
    ctx.rotateToken('second');
    expect(ctx.accessToken.get()).toBe('second');
    expect(ctx.lease.access_token).toBe('first');
  });
});

describe('stopping a task', () => {
  test('aborts the signal with the first reason and ends what moves bytes, not what reports', async () => {
    await using ctx = createTestContext({ inputs: { big: new Uint8Array(4 << 20) } });
    const stream = await ctx.input.openRead('big');
    const upload = await ctx.output.openMultipart('a');
    const endless = async function* (): AsyncGenerator<Uint8Array> {
      for (;;) {
        await turn();
        yield utf8('x');
      }
    };
    const putting = ctx.output.putStream('b', endless());
    putting.catch(() => undefined);
    expect(await ctx.ctrl.isCancelled()).toBe(false);
    ctx.abort('lease_lost');
    ctx.abort('canceled');
    const { reason } = ctx.signal as { reason: unknown };
    expect(TaskAbort.is(reason) && reason.reason).toBe('lease_lost');
    expect(await ctx.ctrl.isCancelled()).toBe(true);
    for (const moving of [
      () => stream.toArray(),
      () => putting,
      () => upload.writeChunk(utf8('x')),
      () => upload.finish(),
      () => ctx.input.getBytesByCid('big'),
      () => ctx.output.putBytes('c', utf8('x')),
    ]) {
      await expect(moving()).rejects.toBe(reason);
    }
    await upload.abort();
    await ctx.ctrl.progress('stopping');
    expect(ctx.outputs.size).toBe(0);
    expect(ctx.openUploads).toBe(0);
  });

  test('closing ends the ports, records late calls, and keeps the outputs', async () => {
    const ctx = createTestContext({ inputs: { a: 'x' } });
    await ctx.output.putBytes('a', utf8('kept'));
    await ctx.close();
    await ctx.close();
    expect(await code(ctx.input.getBytesByCid('a'))).toBe('failed_precondition');
    expect(await code(ctx.output.putBytes('b', utf8('x')))).toBe('failed_precondition');
    await ctx.ctrl.progress(1);
    ctx.log.info('late');
    expect(ctx.progressValues).toEqual([]);
    expect(ctx.logs).toEqual([]);
    expect(ctx.lateCalls.map(({ method }) => method)).toEqual([
      'getBytesByCid',
      'putBytes',
      'progress',
      'info',
    ]);
    expect(text(ctx.outputs.get('a'))).toBe('kept');
    expect(ctx.signal.aborted).toBe(false);
  });
});

test('onCall sees each call before it is performed, and its error is the error of the call', async () => {
  await using ctx = createTestContext({
    inputs: { a: 'x' },
    onCall: ({ port, method, target }) => {
      if (port === 'output') throw new Error(`no ${method} of ${target}`);
    },
  });
  expect(text(await ctx.input.getBytesByCid('a'))).toBe('x');
  await expect(ctx.output.putBytes('b', utf8('x'))).rejects.toThrow('no putBytes of b');
  expect(ctx.calls).toEqual([
    { port: 'input', method: 'getBytesByCid', target: 'a' },
    { port: 'output', method: 'putBytes', target: 'b' },
  ]);
});

describe('names', () => {
  test('are those of the reference node', () => {
    const path = logicalPath('out', 'refined/local/scan_a/RefinedScan.zip');
    expect(path).toBe('out/refined/local/scan_a/RefinedScan.zip');
    expect(artifactName(path, 'task-456')).toBe('out_refined_local_scan_a_RefinedScan_zip_task-456');
    expect(logicalPath(null, '/a')).toBe('a');
    expect(logicalPath('', 'a')).toBe('a');
    expect(logicalPath('//x/y//', '//a')).toBe('x/y/a');
    expect(artifactName('größe 🗺.txt', 't')).toBe('gr__e___txt_t');
  });

  test.each([
    ['a.JSON', 'json'],
    ['a.ply', 'ply'],
    ['a.drc', 'ply_draco'],
    ['a.glb', 'glb'],
    ['a.obj', 'obj'],
    ['a.csv', 'csv'],
    ['a.mp4', 'mp4'],
    ['a.zip', 'zip_data'],
    ['a.tar.gz', 'gz_data'],
    ['a.b/c', 'binary'],
    ['.env', 'binary'],
    ['dir/.env', 'binary'],
    ['a', 'binary'],
    ['a.', 'artifact_data'],
    ['a.ö', '__data'],
    ['a.constructor', 'constructor_data'],
  ])('%s has type %s', (path, type) => {
    expect(dataTypeOf(path)).toBe(type);
  });

  test('of materialised files are sanitised piece by piece', () => {
    expect(materializedPath('../x', 'a/b')).toBe('datasets/___x/___x.a_b');
    expect(materializedPath('', '')).toBe('datasets/part/part.part');
  });
});
