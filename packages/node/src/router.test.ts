import { describe, expect, test } from 'vitest';
import { MillraceError, defineRunner, type Json, type Runner } from '@millrace/runner';
import { RunnerRouter } from './router.ts';
import { memoryLog } from './simulation/scripted-dms.ts';

const runner = (capability: string, close?: () => Promise<void>): Runner =>
  defineRunner({ capability, run: () => Promise.resolve(), ...(close === undefined ? {} : { close }) });

const pick = (router: RunnerRouter, capability: string, capability_filters: Json = null): Runner | null =>
  router.pick({ capability, capability_filters });

describe('RunnerRouter', () => {
  test('matches a capability byte for byte', () => {
    const hello = runner('/examples/hello/v1');
    const router = new RunnerRouter([hello]);
    expect(pick(router, '/examples/hello/v1')).toBe(hello);
    expect(pick(router, '/examples/Hello/v1')).toBeNull();
    expect(pick(router, '/examples/hello/v1/')).toBeNull();
    expect(pick(router, '/examples/hello')).toBeNull();
  });

  test('of several with one capability takes the first whose labels have what the task asks for', () => {
    const [plain, gpu, other] = [runner('a'), runner('a'), runner('a')];
    const router = new RunnerRouter(
      [plain, { runner: gpu, labels: { gpu: 't4' } }, { runner: other, labels: { gpu: 'a100' } }],
      { zone: 'eu' },
    );
    expect(pick(router, 'a')).toBe(plain);
    expect(pick(router, 'a', {})).toBe(plain);
    expect(pick(router, 'a', { zone: 'eu' })).toBe(plain);
    expect(pick(router, 'a', { gpu: 't4' })).toBe(gpu);
    expect(pick(router, 'a', { gpu: 'a100', zone: 'eu' })).toBe(other);
  });

  test('falls back to the first with the capability: the dispatcher matched the filters by rules of its own', () => {
    const [first, second] = [runner('a'), runner('a')];
    const router = new RunnerRouter([first, { runner: second, labels: { gpu: 't4' } }]);
    expect(pick(router, 'a', { gpu: 'none such' })).toBe(first);
    for (const filters of ['text', 7, ['gpu'], true] as Json[])
      expect(pick(router, 'a', filters)).toBe(first);
  });

  test('is not misled by names every object has', () => {
    const [first, second] = [runner('a'), runner('a')];
    const router = new RunnerRouter([first, { runner: second, labels: { constructor: 'x' } }]);
    expect(pick(router, 'a', { constructor: 'x' })).toBe(second);
  });

  test('advertises capabilities sorted by bytes, each once', () => {
    const router = new RunnerRouter([
      runner('b'),
      runner('a'),
      runner('b'),
      runner('Z'),
      runner('\u{1F600}'),
      runner('\uFFFD'),
    ]);
    expect(router.capabilities).toEqual(['Z', 'a', 'b', '\uFFFD', '\u{1F600}']);
  });

  test('advertises the labels of the node and its runners; where they differ the node, then the first, is right', () => {
    const router = new RunnerRouter(
      [
        { runner: runner('a'), labels: { gpu: 't4', zone: 'us' } },
        { runner: runner('b'), labels: { gpu: 'a100', disk: 'ssd' } },
      ],
      { zone: 'eu' },
    );
    expect(router.labels).toEqual({ zone: 'eu', gpu: 't4', disk: 'ssd' });
  });

  test('refuses to be without runners and a capability that is none', () => {
    expect(() => new RunnerRouter([])).toThrow(MillraceError);
    expect(() => new RunnerRouter([{ capability: '', run: () => Promise.resolve() }])).toThrow(/capability/);
  });

  test('closes every runner once, however often it is registered and whatever fails', async () => {
    const closed: string[] = [];
    const twice = runner('a', () => Promise.resolve(void closed.push('a')));
    const broken = runner('b', () => {
      closed.push('b');
      throw new Error('stuck');
    });
    const log = memoryLog();
    const router = new RunnerRouter([twice, broken, { runner: twice, labels: { x: 'y' } }, runner('c')]);
    await Promise.all([router.close(log), router.close(log)]);
    await router.close(log);
    expect(closed).toEqual(['a', 'b']);
    expect(log.lines).toEqual([
      { level: 'error', message: 'runner could not be closed', fields: { capability: 'b', error: 'stuck' } },
    ]);
  });
});
