import { randomUUID } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { artifactName, dataTypeOf, logicalPath, materializedPath } from './names.ts';

describe('logical paths', () => {
  test.each([
    ['out', 'a/b.zip', 'out/a/b.zip'],
    ['/out/dir//', '//a', 'out/dir/a'],
    ['', 'a', 'a'],
    [null, '/a/b/', 'a/b/'],
    ['out', '', 'out'],
    ['/', 'a', 'a'],
  ])('prefix %j and path %j give %j', (prefix, rel, path) => {
    expect(logicalPath(prefix, rel)).toBe(path);
  });

  test.each([
    [null, '', /^artifact path "" must not be empty for a task without outputs_prefix$/],
    ['/', '//', /^artifact path "\/\/" must not be empty/],
    ['out', '.', /^artifact path "\." must not have "\." or "\.\." segments$/],
    ['out', '../x', /^artifact path "\.\.\/x" must not have/],
    ['out', 'a/./b', /must not have/],
    ['out', '/a/..', /must not have/],
    ['out', 'a\0b', /^artifact path "a\\u0000b" must not contain control characters$/],
    ['out', 'a\nb', /control/],
    ['out', 'a\u007f', /control/],
    ['out', 'a\u009b', /control/],
  ])('prefix %j and path %j are refused', (prefix, rel, message) => {
    expect(() => logicalPath(prefix, rel)).toThrow(message);
    expect(() => logicalPath(prefix, rel)).toThrow(expect.objectContaining({ code: 'invalid_argument' }));
  });

  test('a path has up to 1024 bytes, without the slashes in front and without the prefix', () => {
    const longest = 'ä'.repeat(512);
    expect(logicalPath('out', `//${longest}`)).toBe(`out/${longest}`);
    expect(() => logicalPath(null, `${longest}x`)).toThrow(/ must be at most 1024 bytes, is 1025$/);
  });

  test('dots are fine where they are not the whole segment', () => {
    expect(logicalPath(null, '..a/b../.c')).toBe('..a/b../.c');
  });
});

describe('artifact names', () => {
  test('are the path and the task id, with everything special as _', () => {
    expect(artifactName('out/refined/local/scan_a/RefinedScan.zip', 'task-456')).toBe(
      'out_refined_local_scan_a_RefinedScan_zip_task-456',
    );
    expect(artifactName('größe 😀', 't')).toBe('gr__e___t');
    expect(artifactName('', 't')).toBe('artifact_t');
  });

  test('are 128 bytes at most: longer ones keep their start and get a hash of the path that is always the same', () => {
    const task = randomUUID();
    const fits = 'p'.repeat(91);
    expect(artifactName(fits, task)).toBe(`${fits}_${task}`);
    expect(artifactName(fits, task)).toHaveLength(128);
    const long = `${fits}x`;
    const name = artifactName(long, task);
    expect(name).toHaveLength(128);
    expect(name).toMatch(new RegExp(`^p{74}_[0-9a-f]{16}_${task}$`));
    expect(artifactName(long, task)).toBe(name);
    expect(artifactName(`${fits}y`, task)).not.toBe(name);
  });

  test('can be told apart where two paths sanitise to one name', () => {
    expect(artifactName('a/b', 't')).toBe(artifactName('a_b', 't'));
    expect(artifactName('a/b', 't', true)).toMatch(/^a_b_[0-9a-f]{16}_t$/);
    expect(artifactName('a/b', 't', true)).not.toBe(artifactName('a_b', 't', true));
  });
});

describe('data types', () => {
  test.each([
    ['a.json', 'json'],
    ['dir/a.PLY', 'ply'],
    ['a.drc', 'ply_draco'],
    ['a.glb', 'glb'],
    ['a.obj', 'obj'],
    ['a.csv', 'csv'],
    ['a.mp4', 'mp4'],
    ['a.zip', 'zip_data'],
    ['a.tar.gz', 'gz_data'],
    ['a.t~x', 't_x_data'],
    ['a', 'binary'],
    ['dir.zip/a', 'binary'],
    ['dir.zip/', 'zip_data'],
    ['.env', 'binary'],
    ['dir/.env', 'binary'],
    ['a.', 'artifact_data'],
    ['..', 'binary'],
    ['', 'binary'],
    ['a.constructor', 'constructor_data'],
  ])('%j is %j', (path, type) => {
    expect(dataTypeOf(path)).toBe(type);
  });

  test('are 128 bytes at most', () => {
    expect(dataTypeOf(`a.${'e'.repeat(123)}`)).toBe(`${'e'.repeat(123)}_data`);
    expect(dataTypeOf(`a.${'e'.repeat(124)}`)).toHaveLength(128);
    expect(dataTypeOf(`a.${'e'.repeat(124)}`)).toMatch(/^e+_[0-9a-f]{16}_data$/);
  });
});

describe('materialised files', () => {
  test.each([
    [
      'dmt_manifest_2024-01-02_03-04-05',
      'dmt_manifest_json',
      'datasets/2024-01-02_03-04-05/dmt_manifest_2024-01-02_03-04-05.dmt_manifest_json',
    ],
    ['x-2024-01-02-03-04-05-y', 't', 'datasets/2024-01-02-03-04-05/x-2024-01-02-03-04-05-y.t'],
    ['a/../b.c', 'd/e', 'datasets/a____b_c/a____b_c.d_e'],
    ['', '', 'datasets/part/part.part'],
    ['ü😀', 't', 'datasets/__/__.t'],
  ])('%j of type %j is %j', (name, type, path) => {
    expect(materializedPath(name, type).join('/')).toBe(path);
  });

  test('have names a file system takes', () => {
    const [, scan, file] = materializedPath('n'.repeat(300), 't'.repeat(300));
    expect(scan).toHaveLength(255);
    expect(file!.length).toBeLessThanOrEqual(255);
    expect(materializedPath('n'.repeat(128), 't'.repeat(126)).at(-1)).toBe(
      `${'n'.repeat(128)}.${'t'.repeat(126)}`,
    );
    const [one, two] = ['1', '2'].map((end) =>
      materializedPath('n'.repeat(128) + end, 't'.repeat(128)).at(-1),
    );
    expect(one).not.toBe(two);
  });
});
