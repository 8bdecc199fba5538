import { describe, expect, test } from 'vitest';
import type { Json } from '@millrace/runner';
import { SupervisionBounds, type SupervisionOptions } from './policy.ts';

const of = (supervision: Json, options?: SupervisionOptions) =>
  new SupervisionBounds(options).of({ supervision });

describe('the supervision of a task', () => {
  test('that says nothing is one try in a lane of its own', () => {
    const expected = {
      lane: null,
      admission: 'dropIfRunning',
      restart: { type: 'never' },
      backoff: { jitter: 'full', firstMs: 1_000, maxMs: 30_000, factor: 2 },
      maxRetries: null,
      timeoutMs: null,
      floorMs: 100,
      queueLimit: 100,
    };
    for (const meta of [null, {}, 'text', [1], { other: 1 }] as Json[]) {
      expect(new SupervisionBounds().of(meta)).toEqual(expected);
    }
    expect(of({})).toEqual(expected);
  });

  test("is what it asks for, member by member above the operator's defaults", () => {
    const defaults = {
      restart: { type: 'onFailure' },
      maxRetries: 2,
      backoff: { firstMs: 10, jitter: 'none' },
      slot: 'gpu',
    } as const;
    expect(of({ maxRetries: 5, backoff: { maxMs: 20 } }, { defaults })).toMatchObject({
      lane: 'gpu',
      restart: { type: 'onFailure' },
      maxRetries: 5,
      backoff: { jitter: 'none', firstMs: 10, maxMs: 20, factor: 2 },
    });
    expect(new SupervisionBounds({ defaults }).of(null)).toMatchObject({ lane: 'gpu', maxRetries: 2 });
  });

  test.each<[SupervisionOptions, Json, string]>([
    [{ maxRetries: 3 }, { maxRetries: 3 }, ''],
    [
      { maxRetries: 3 },
      { maxRetries: 4 },
      'meta.supervision.maxRetries must be at most 3, which is what this node allows, got 4',
    ],
    [{ timeoutMs: 50 }, { timeout: 50 }, ''],
    [{ timeoutMs: 50 }, { timeout: 51 }, 'meta.supervision.timeout must be at most 50'],
    [{ restart: 'onFailure' }, { restart: { type: 'onFailure' } }, ''],
    [
      { restart: 'onFailure' },
      { restart: { type: 'always' } },
      'meta.supervision.restart must be at most onFailure, which is what this node allows, got always',
    ],
    [{ restart: 'never' }, { restart: { type: 'onFailure' } }, 'restart must be at most never'],
  ])('within %j: %j', (options, asked, message) => {
    if (message === '') expect(of(asked, options)).toBeDefined();
    else {
      expect(() => of(asked, options)).toThrow(message);
      expect(() => of(asked, options)).toThrow(
        expect.objectContaining({ code: 'permission_denied' }) as Error,
      );
    }
  });

  test("without a limit of its own has the operator's; zero is no limit", () => {
    const options = { maxRetries: 3, timeoutMs: 50 };
    for (const asked of [{}, { maxRetries: 0 }] as Json[]) {
      expect(of(asked, options)).toMatchObject({ maxRetries: 3, timeoutMs: 50 });
    }
    expect(of({ maxRetries: 0 })).toMatchObject({ maxRetries: null });
  });

  test.each<[Json, string]>([
    ['never', 'meta.supervision must be a JSON object'],
    [
      { restarts: {} },
      'meta.supervision.restarts is unknown; meta.supervision may have: slot, admission, timeout',
    ],
    [{ backoff: { first: 1 } }, 'meta.supervision.backoff.first is unknown'],
    [{ restart: 'never' }, 'meta.supervision.restart must be a JSON object'],
    [{ slot: 'a/b' }, 'invalid model: meta.supervision.slot: slot must be letters'],
    [{ slot: 'x'.repeat(65) }, 'slot must be at most 64 characters, got 65'],
    [{ timeout: 0 }, 'meta.supervision.timeout: timeout must be greater than zero'],
    [{ timeout: '5' }, 'meta.supervision.timeout must be an integer >= 0, got "5"'],
    [{ admission: 'drop' }, 'meta.supervision.admission must be dropIfRunning, replace, queue'],
    [{ maxRetries: -1 }, 'meta.supervision.maxRetries must be an integer >= 0, got -1'],
    [
      { backoff: { firstMs: 50_000 } },
      'meta.supervision.backoff.maxMs: backoff max_ms must be >= first_ms, got 30000 < 50000',
    ],
  ])('%j is refused by name', (asked, message) => {
    expect(() => of(asked)).toThrow(message);
  });

  test.each<[SupervisionOptions, string]>([
    [{ restart: 'sometimes' as 'never' }, 'supervision.restart must be never, onFailure or always'],
    [{ maxRetries: -1 }, 'supervision.maxRetries must be'],
    [{ timeoutMs: 0 }, 'supervision.timeoutMs: timeout must be greater than zero'],
    [{ floorMs: 0.5 }, 'supervision.floorMs must be'],
    [{ queueLimit: -1 }, 'supervision.queueLimit must be'],
    [{ defaults: { slot: '' } }, 'supervision.defaults.slot: slot cannot be empty'],
    [{ maxRetries: 1, defaults: { maxRetries: 2 } }, 'supervision.defaults.maxRetries must be at most 1'],
  ])('the bounds %j are refused when they are set', (options, message) => {
    expect(() => new SupervisionBounds(options)).toThrow(message);
  });
});
