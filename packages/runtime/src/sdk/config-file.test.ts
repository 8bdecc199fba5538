import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { describeError } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { defaultDataDir, loadConfig, writeConfigFile } from './config-file.ts';

const defaults = { port: 80, deep: { on: true, list: [] as string[] }, any: null, map: {} };
let dir: string;

beforeAll(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-config-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

async function load(name: string, text: string): Promise<typeof defaults> {
  const file = path.join(dir, name);
  await writeFile(file, text);
  return loadConfig({ defaults }, { path: file, exists: true });
}

describe('a broken configuration file', () => {
  test.each([
    ['probe.json', '{"port": 1,}', 'is not valid JSON'],
    ['probe.yaml', 'port: 1\nport: 2\n', 'is not valid YAML'],
    ['probe.yml', 'a: [', 'is not valid YAML'],
    ['probe.toml', 'port = \n', 'is not valid TOML'],
    ['probe.json', '{"port": "80"}', 'port must be a number, got a string'],
    ['probe.json', '{"deep": {"of": true}}', 'deep.of is unknown; deep may have on, list'],
    ['probe.yaml', '- 1\n', 'the file must be an object, got an array'],
    ['probe.toml', 'deep = 3\n', 'deep must be an object, got a number'],
    ['probe.json', '{"__proto__": {"on": true}}', '__proto__ is unknown'],
  ])('%s with %j is refused with the reason', async (name, text, message) => {
    const error: unknown = await load(name, text).catch((thrown: unknown) => thrown);
    expect(describeError(error)).toContain(path.join(dir, name));
    expect(describeError(error)).toContain(message);
  });
});

describe('a configuration file', () => {
  test('may have any members where the defaults have none, and any type where they have null', async () => {
    expect(await load('c.json', '{"map": {"x": {"y": 1}}, "any": [1]}')).toEqual({
      ...defaults,
      map: { x: { y: 1 } },
      any: [1],
    });
  });

  test('of TOML gives plain objects, dates as text', async () => {
    const config = await load('c.toml', '[map]\nwhen = 2024-01-02T03:04:05Z\n[map.deep]\nx = 1\n');
    expect(config.map).toStrictEqual({ when: '2024-01-02T03:04:05.000Z', deep: { x: 1 } });
    expect(Object.getPrototypeOf(config.map)).toBe(Object.prototype);
  });

  test('is left as it was, with nothing beside it, when a value cannot be written', async () => {
    const file = path.join(dir, 'kept.toml');
    await writeConfigFile({ a: 1 }, file);
    await expect(writeConfigFile({ a: { b: null } }, file)).rejects.toThrow('cannot be written as TOML');
    expect((await readdir(dir)).filter((name) => name.startsWith('kept'))).toEqual(['kept.toml']);
    expect(await loadConfig({ defaults: { a: 0 } }, { path: file, exists: true })).toEqual({ a: 1 });
  });

  test("is checked by the author's own parse, defaults merged in", async () => {
    const file = path.join(dir, 'own.json');
    await writeFile(file, '{"extra": 1}');
    const parse = (value: unknown): unknown => ({ seen: value });
    expect(await loadConfig({ defaults: { a: 1 }, parse }, { path: file, exists: true })).toEqual({
      seen: { a: 1, extra: 1 },
    });
  });
});

describe('the data folder', () => {
  test('is lower case and without spaces on Linux, under XDG_DATA_HOME or the home', () => {
    expect(defaultDataDir('My Runtime', { HOME: '/home/u' }, 'linux')).toBe('/home/u/.local/share/myruntime');
    expect(defaultDataDir('X', { HOME: '/home/u', XDG_DATA_HOME: '/data' }, 'linux')).toBe('/data/x');
  });

  test('keeps the name elsewhere', () => {
    expect(defaultDataDir('My Runtime', { HOME: '/Users/u' }, 'darwin')).toBe(
      '/Users/u/Library/Application Support/My Runtime',
    );
  });
});
