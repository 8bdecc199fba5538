import { expect, test } from 'vitest';
import type { Engine } from './engine.ts';
import { engineNames, openEngine, registerEngine } from './engine.ts';
import './identity.ts';
import { DEFAULT_LIMITS } from './limits.ts';

const artifact = { alg: 'sha256', digest: '0'.repeat(64), engine: 'identity', wasm: new Uint8Array(0) };

test('importing an engine makes it available by name', () => {
  expect(engineNames()).toContain('identity');
});

test.each(['no-such', ''])('the unknown engine %j is an error that lists what there is', async (name) => {
  await expect(openEngine(name)).rejects.toMatchObject({
    code: 'not_found',
    message: `compute: unknown engine ${JSON.stringify(name)} (available: [${engineNames().join(' ')}])`,
    details: { reason: 'unknown-engine' },
  });
});

test('registering a name again replaces what was there, and the configuration reaches the constructor', async () => {
  const engine: Engine = {
    name: 'one',
    load: () => Promise.reject(new Error('not here')),
    close: () => Promise.resolve(),
  };
  let given: unknown;
  registerEngine('replaced', () => ({ ...engine, name: 'first' }));
  registerEngine('replaced', (config) => {
    given = config;
    return engine;
  });
  expect(await openEngine('replaced', { maxMemoryMb: 7 })).toBe(engine);
  expect(given).toEqual({ maxMemoryMb: 7 });
});

test('identity gives its input back, and {} for none', async () => {
  const engine = await openEngine('identity');
  const instance = await engine.load(artifact);
  const input = new TextEncoder().encode('not even JSON');
  expect(await instance.invoke(input, DEFAULT_LIMITS)).toEqual(input);
  expect(Buffer.from(await instance.invoke(new Uint8Array(0), DEFAULT_LIMITS)).toString()).toBe('{}');
  await instance.close();
  await engine.close();
});
