import { MillraceError, sleep, type Random } from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { openLogin, type Login } from './login.ts';
import {
  KEY,
  ScriptedDds,
  WALLET,
  hang,
  memoryLog,
  statusError,
  transportError,
  type DdsCall,
} from './scripted-dds.test.support.ts';

const HOUR = 3_600_000;
const MINUTE = 60_000;

interface World {
  readonly clock: SimulatedClock;
  readonly dds: ScriptedDds;
  readonly login: Login;
  readonly log: ReturnType<typeof memoryLog>;
  readonly lost: () => number;
}

interface Settings {
  readonly ratio?: number;
  readonly retries?: number;
  readonly jitterMs?: number;
  /** Default: the middle, which makes the refresh point exact and a backoff factor 1. */
  readonly random?: Random;
}

function world({ ratio = 0.75, retries = 3, jitterMs = 500, random = () => 0.5 }: Settings = {}): World {
  const clock = new SimulatedClock();
  const dds = new ScriptedDds(clock);
  const log = memoryLog();
  let lost = 0;
  const login = openLogin({
    dds,
    privateKeyHex: KEY,
    wallet: WALLET,
    config: { tokenSafetyRatio: ratio, tokenReauthMaxRetries: retries, tokenReauthJitterMs: jitterMs },
    clock,
    random,
    log: log.log,
    onRegistrationLost: () => (lost += 1),
  });
  return { clock, dds, login, log, lost: () => lost };
}

/** What became of a promise so far. */
function watch<T>(promise: Promise<T>): { value?: T; error?: unknown } {
  const state: { value?: T; error?: unknown } = {};
  promise.then(
    (value) => (state.value = value),
    (error: unknown) => (state.error = error),
  );
  return state;
}

describe('the life of a token', () => {
  test('the first call logs in with nonce and verify, later calls are answered without traffic', async () => {
    const { clock, dds, login } = world();
    expect(dds.calls).toEqual([]);
    expect(await login.get()).toBe('token-1');
    await clock.advance(45 * MINUTE - 1);
    for (let call = 0; call < 10; call += 1) expect(await login.get()).toBe('token-1');
    expect(dds.calls).toEqual([
      { call: 'nonce', at: 0 },
      { call: 'verify', at: 0 },
    ]);
    await login.close();
  });

  test('the background refreshes at the refresh point, with nobody asking, again and again', async () => {
    const { clock, dds, login } = world();
    await login.get();
    await clock.advance(3 * 45 * MINUTE);
    expect(dds.at('verify')).toEqual([0, 45 * MINUTE, 90 * MINUTE, 135 * MINUTE]);
    expect(await login.get()).toBe('token-4');
    await login.close();
  });

  test('the refresh point is now + ttl x ratio + U(-J, +J), never before 1 ms and never after the expiry', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 2_000, max: HOUR }),
        fc.double({ min: 0, max: 1, noNaN: true }),
        fc.integer({ min: 0, max: 10_000 }),
        fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }),
        async (ttl, ratio, jitterMs, draw) => {
          const { clock, dds, login } = world({ ratio, jitterMs, random: () => draw });
          dds.ttlMs = ttl;
          await login.get();
          const wanted = ttl * ratio + (2 * draw - 1) * jitterMs;
          const refreshAt = Math.min(ttl, Math.max(1, wanted));
          // The background keeps a second between logins; a caller does not.
          const expected = Math.max(1_000, refreshAt);
          expect(clock.nextAt).toBeCloseTo(expected, 3);
          expect(dds.at('nonce')).toEqual([0]);
          await login.close();
        },
      ),
      { numRuns: 30 },
    );
  });

  test('a caller past the refresh point of a very short token logs in although the background waits', async () => {
    const { clock, dds, login } = world({ jitterMs: 0 });
    dds.ttlMs = 400;
    await login.get();
    await clock.advance(301);
    expect(await login.get()).toBe('token-1');
    await clock.advance(0);
    expect(dds.at('nonce')).toEqual([0, 301]);
    await login.close();
  });

  test('tokens that live a moment do not make the background spin', async () => {
    const { clock, dds, login } = world();
    dds.ttlMs = 5;
    await login.get();
    await clock.advance(10_000);
    expect(dds.at('nonce')).toHaveLength(11);
    await login.close();
  });
});

describe('many callers', () => {
  test('share one login, and the next call needs none', async () => {
    const { clock, dds, login } = world();
    dds.before = () => sleep(clock, 1_000);
    const calls = Array.from({ length: 50 }, () => watch(login.get()));
    await clock.advance(2_000);
    expect(new Set(calls.map(({ value }) => value))).toEqual(new Set(['token-1']));
    expect(await login.get()).toBe('token-1');
    expect(dds.calls).toHaveLength(2);
    await login.close();
  });

  test('can be cancelled one by one, and the login goes on for the others', async () => {
    const { clock, dds, login } = world();
    dds.before = () => sleep(clock, 1_000);
    const controller = new AbortController();
    const cancelled = watch(login.get({ signal: controller.signal }));
    const other = watch(login.get());
    await clock.advance(500);
    const reason = new MillraceError('canceled', 'enough');
    controller.abort(reason);
    await clock.advance(0);
    expect(cancelled.error).toBe(reason);
    expect(other).toEqual({});
    await clock.advance(1_500);
    expect(other.value).toBe('token-1');
    await login.close();
  });

  test('a call whose signal is aborted already starts nothing', async () => {
    const { dds, login } = world();
    const reason = new MillraceError('canceled', 'before');
    await expect(login.get({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    expect(dds.calls).toEqual([]);
    await login.close();
  });

  test('a login goes on when its only caller has gone, and the next caller gets its token', async () => {
    const { clock, dds, login } = world();
    dds.before = () => sleep(clock, 1_000);
    const controller = new AbortController();
    const first = watch(login.get({ signal: controller.signal }));
    await clock.advance(500);
    controller.abort(new Error('gone'));
    await clock.advance(2_000);
    expect(first.error).toEqual(new Error('gone'));
    expect(await login.get()).toBe('token-1');
    expect(dds.at('nonce')).toEqual([0]);
    await login.close();
  });
});

describe('failing logins', () => {
  test.each([
    ['transport', transportError()],
    ['status 500', statusError('nonce', 500)],
    ['status 401', statusError('nonce', 401)],
    ['a bad answer', new MillraceError('data_loss', 'no JSON', { retryable: true })],
    ['a bug', new TypeError('x is undefined')],
  ])('%s: attempts are retried after a pause of U(0, J)', async (_title, error) => {
    const { clock, dds, login } = world({ random: () => 0.4 });
    let failures = 3;
    dds.before = () => {
      if ((failures -= 1) >= 0) throw error;
    };
    const call = watch(login.get());
    await clock.advance(599);
    expect(call).toEqual({});
    await clock.advance(1);
    expect(call.value).toBe('token-1');
    expect(dds.at('nonce')).toEqual([0, 200, 400, 600]);
    await login.close();
  });

  test('after the last attempt all callers get the error of it, with its details', async () => {
    const { clock, dds, login } = world({ retries: 2, jitterMs: 0 });
    dds.before = (call) => {
      if (call === 'verify') throw statusError('verify', 401);
    };
    const calls = [watch(login.get()), watch(login.get())];
    await clock.advance(0);
    for (const { error } of calls) {
      expect(MillraceError.is(error)).toBe(true);
      expect(error).toMatchObject({
        message: 'DDS SIWE login failed after 3 attempts: verify status 401',
        details: { call: 'verify', status: 401 },
      });
    }
    expect(dds.at('verify')).toHaveLength(3);
    await login.close();
  });

  test('no retries means one attempt', async () => {
    const { clock, dds, login } = world({ retries: 0 });
    dds.before = () => {
      throw transportError();
    };
    const call = watch(login.get());
    await clock.advance(0);
    expect(call.error).toBeInstanceOf(MillraceError);
    expect(dds.calls).toHaveLength(1);
    await login.close();
  });

  test('who asks after a failed login waits for the next one, which comes after a growing pause', async () => {
    const { clock, dds, login } = world({ retries: 0 });
    dds.before = () => {
      throw transportError();
    };
    const times: number[] = [];
    for (let round = 0; round < 8; round += 1) {
      const call = watch(login.get());
      await clock.runUntil(() => call.error !== undefined);
      times.push(clock.monotonic() / 1000);
    }
    expect(times).toEqual([0, 2, 6, 14, 30, 62, 122, 182]);
    await login.close();
  });

  test('a login that succeeds makes the pauses start small again', async () => {
    const { clock, dds, login } = world({ retries: 0 });
    let broken = true;
    dds.before = () => {
      if (broken) throw transportError();
    };
    for (let round = 0; round < 4; round += 1) {
      const call = watch(login.get());
      await clock.runUntil(() => call.error !== undefined);
    }
    broken = false;
    const call = watch(login.get());
    await clock.runUntil(() => call.value !== undefined);
    broken = true;
    login.invalidate(call.value!);
    const start = clock.monotonic();
    for (let round = 0; round < 2; round += 1) {
      const failed = watch(login.get());
      await clock.runUntil(() => failed.error !== undefined);
    }
    expect(clock.monotonic() - start).toBe(2_000);
    await login.close();
  });

  test('a Retry-After longer than the pause is kept to, and one of a day is cut to ten minutes', async () => {
    for (const [asked, kept] of [
      [30_000, 30_000],
      [86_400_000, 600_000],
    ] as const) {
      const { clock, dds, login } = world({ retries: 0 });
      dds.before = () => {
        throw statusError('nonce', 503, { retry_after_ms: asked });
      };
      await Promise.allSettled([login.get()]);
      const call = watch(login.get());
      await clock.runUntil(() => call.error !== undefined);
      expect(clock.monotonic()).toBe(kept);
      await login.close();
    }
  });

  test('an expiry in the past or now is a failed login, one in 1 ms is not', async () => {
    for (const [ttl, accepted] of [
      [-1, false],
      [0, false],
      [1, true],
    ] as const) {
      const { dds, login } = world({ retries: 0 });
      dds.ttlMs = ttl;
      const [outcome] = await Promise.allSettled([login.get()]);
      expect(outcome?.status).toBe(accepted ? 'fulfilled' : 'rejected');
      if (outcome?.status === 'rejected') expect(String(outcome.reason)).toMatch(/must expire in the future/);
      await login.close();
    }
  });

  test('a call that asks at the moment a login fails gets an answer too', async () => {
    const { clock, dds, login } = world({ retries: 0 });
    let broken = true;
    dds.before = () => {
      if (broken) throw transportError();
    };
    const chained = watch(
      login.get().catch(() => {
        broken = false;
        return login.get();
      }),
    );
    await clock.runUntil(() => chained.value !== undefined);
    expect(chained.value).toBe('token-1');
    await login.close();
  });
});

describe('a token past its refresh point', () => {
  test('is used without waiting while DDS is down, until it really expires', async () => {
    const { clock, dds, login, log } = world();
    await login.get();
    dds.before = () => {
      throw transportError();
    };
    await clock.advance(HOUR - 1);
    const last = watch(login.get());
    await clock.advance(0);
    expect(last.value).toBe('token-1');

    await clock.advance(1);
    const waiting = watch(login.get());
    await clock.advance(0);
    expect(waiting).toEqual({});
    dds.before = () => undefined;
    await clock.advance(61_000);
    expect(waiting.value).toBe('token-2');

    // Each login is four attempts with pauses of 250 ms; between logins 2, 4, 8 ... 60 s.
    const starts = dds.at('nonce').filter((_at, index, all) => index === 0 || _at - all[index - 1]! > 300);
    const gaps = starts.slice(2).map((at, index) => at - starts[index + 1]! - 750);
    expect(gaps.slice(0, 8)).toEqual([2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]);
    expect(
      log.lines.some(({ msg, token_valid_ms }) => msg === 'DDS login failed' && Number(token_valid_ms) > 0),
    ).toBe(true);
    await login.close();
  });

  test('is used without waiting while a DDS that never answers is asked', async () => {
    const { clock, dds, login } = world();
    await login.get();
    dds.before = (_call, signal) => hang(clock, signal);
    await clock.advance(50 * MINUTE);
    expect(dds.underWay).toBe(1);
    for (let call = 0; call < 5; call += 1) expect(await login.get()).toBe('token-1');
    expect(dds.underWay).toBe(1);
    await login.close();
    expect(dds.underWay).toBe(0);
  });
});

describe('invalidate', () => {
  test('forces a login on the next call and not before', async () => {
    const { clock, dds, login } = world();
    login.invalidate(await login.get());
    await clock.advance(MINUTE);
    expect(dds.at('verify')).toEqual([0]);
    expect(await login.get()).toBe('token-2');
    expect(dds.at('verify')).toEqual([0, MINUTE]);
    await login.close();
  });

  test('with a token that is not current changes nothing', async () => {
    const { dds, login } = world();
    const first = await login.get();
    login.invalidate(first);
    const second = await login.get();
    login.invalidate(first);
    login.invalidate('never seen');
    expect(await login.get()).toBe(second);
    expect(dds.tokens).toBe(2);
    await login.close();
  });

  test('by many callers that were refused with one token costs one login', async () => {
    const { dds, login } = world();
    const token = await login.get();
    const tokens = await Promise.all(
      Array.from({ length: 20 }, () => {
        login.invalidate(token);
        return login.get();
      }),
    );
    expect(new Set(tokens)).toEqual(new Set(['token-2']));
    expect(dds.tokens).toBe(2);
    await login.close();
  });

  test('does not bring the refused token back when the login then fails', async () => {
    const { clock, dds, login } = world({ retries: 0 });
    login.invalidate(await login.get());
    dds.before = () => {
      throw transportError();
    };
    await expect(login.get()).rejects.toThrow(/login failed/);
    const waiting = watch(login.get());
    await clock.advance(1_000);
    expect(waiting).toEqual({});
    await login.close();
  });

  test('leaves the background to its time when nobody asks', async () => {
    const { clock, dds, login } = world();
    login.invalidate(await login.get());
    await clock.advance(45 * MINUTE);
    expect(dds.at('verify')).toEqual([0, 45 * MINUTE]);
    await login.close();
  });
});

describe('a registration that is lost', () => {
  test.each([
    ['verify', 403, 4],
    ['verify', 404, 4],
    ['verify', 401, 0],
    ['verify', 500, 0],
    ['nonce', 403, 0],
    ['nonce', 404, 0],
  ] as const)('%s %i tells so %i times in four attempts', async (call, status, times) => {
    const { clock, dds, login, lost } = world();
    dds.before = (each) => {
      if (each === call) throw statusError(call, status);
    };
    const failed = watch(login.get());
    await clock.runUntil(() => failed.error !== undefined);
    expect(lost()).toBe(times);
    await login.close();
  });
});

describe('wrong clocks', () => {
  test.each([HOUR, -HOUR, 26 * HOUR])(
    'a clock that is %i ms off changes neither the login nor the refresh, and is warned of',
    async (aheadMs) => {
      const { clock, dds, login, log } = world();
      dds.aheadMs = aheadMs;
      expect(await login.get()).toBe('token-1');
      await clock.advance(45 * MINUTE - 1);
      expect(dds.tokens).toBe(1);
      await clock.advance(1);
      expect(dds.tokens).toBe(2);
      expect(log.lines.find(({ level }) => level === 'warn')).toMatchObject({ behind_ms: aheadMs });
      await login.close();
    },
  );

  test("a difference of five seconds is the network's, and one of more is not", async () => {
    for (const [aheadMs, warnings] of [
      [5_000, 0],
      [5_001, 1],
    ] as const) {
      const { dds, login, log } = world();
      dds.aheadMs = aheadMs;
      await login.get();
      expect(log.lines.filter(({ level }) => level === 'warn')).toHaveLength(warnings);
      await login.close();
    }
  });

  test('with a service that does not tell its time the local clock counts', async () => {
    const { dds, login } = world({ retries: 0 });
    dds.tellsTime = false;
    dds.aheadMs = -HOUR;
    await expect(login.get()).rejects.toThrow(/expire in the future, got an expiry 0 ms ago/);
    await login.close();
  });

  test('a wall clock that jumps while a token lives changes nothing', async () => {
    const { clock, dds, login } = world();
    await login.get();
    for (const jump of [HOUR, -3 * HOUR]) {
      clock.jumpWallClock(jump);
      await clock.advance(10 * MINUTE);
      expect(await login.get()).toBe('token-1');
    }
    await clock.advance(25 * MINUTE);
    expect(dds.at('verify')).toEqual([0, 45 * MINUTE]);
    await login.close();
  });
});

describe('close', () => {
  test('ends a login under way and the calls that wait for it, and leaves no timer', async () => {
    const { clock, dds, login } = world();
    dds.before = (_call, signal) => hang(clock, signal);
    const calls = [watch(login.get()), watch(login.get({ signal: new AbortController().signal }))];
    await clock.advance(10);
    await login.close();
    await clock.advance(0);
    for (const { error } of calls) expect(error).toMatchObject({ code: 'canceled' });
    expect(dds.underWay).toBe(0);
    expect(clock.pending).toBe(0);
  });

  test('ends the pause between attempts and the pause between logins', async () => {
    for (const retries of [0, 3]) {
      const { clock, dds, login } = world({ retries });
      dds.before = () => {
        throw transportError();
      };
      if (retries === 0) await Promise.allSettled([login.get()]);
      const call = watch(login.get());
      await clock.advance(1);
      expect(call).toEqual({});
      await login.close();
      expect(call.error).toMatchObject({ code: 'canceled' });
      expect(clock.pending).toBe(0);
    }
  });

  test('drops the token, stops the background, and may be called again', async () => {
    const { clock, dds, login } = world();
    await login.get();
    await Promise.all([login.close(), login.close()]);
    await login[Symbol.asyncDispose]();
    await expect(login.get()).rejects.toMatchObject({ code: 'canceled' });
    expect(clock.pending).toBe(0);
    await clock.advance(2 * HOUR);
    expect(dds.tokens).toBe(1);
  });

  test('waits for an answer that comes late, which is not used', async () => {
    const { clock, dds, login } = world();
    // Deaf to the signal, unlike the HTTP client.
    dds.before = (call) => (call === 'verify' ? sleep(clock, 1_000) : undefined);
    const call = watch(login.get());
    await clock.advance(500);
    const closed = watch(login.close().then(() => 'closed'));
    await clock.advance(499);
    expect(closed).toEqual({});
    await clock.advance(1);
    expect(closed.value).toBe('closed');
    expect(call.error).toMatchObject({ code: 'canceled' });
    expect(clock.pending).toBe(0);
  });
});

test('no token, signature or key is in any log line or error', async () => {
  const { clock, dds, login, log } = world();
  await login.get();
  dds.before = (call) => {
    if (call === 'verify') throw statusError('verify', 403);
  };
  await clock.advance(HOUR + MINUTE);
  const told = JSON.stringify(log.lines);
  expect(log.lines.length).toBeGreaterThan(5);
  expect(told).not.toMatch(/token-\d|0x[0-9a-f]{130}/);
  expect(told).not.toContain(KEY);
  await login.close();
});

test('in any weather, from many seeds: no expired or refused token, one login at a time, nobody waits for ever', async () => {
  for (let seed = 1; seed <= 8; seed += 1) {
    const random = seededRandom(seed);
    const { clock, dds, login } = world({ random, retries: 1 });
    dds.ttlMs = 20_000 + random() * 60_000;
    const validUntil = new Map<string, number>();
    const refused = new Set<string>();
    const storm = (): boolean => clock.monotonic() < 4 * MINUTE;
    dds.before = async (_call: DdsCall, signal) => {
      await sleep(clock, random() * 3_000, signal);
      if (storm() && random() < 0.3) throw random() < 0.5 ? transportError() : statusError('verify', 403);
    };
    const verify = dds.verify.bind(dds);
    dds.verify = async (...args) => {
      const answer = await verify(...args);
      validUntil.set(answer.accessToken, clock.monotonic() + dds.ttlMs);
      return answer;
    };
    let waiting = 0;
    const caller = async (): Promise<void> => {
      for (let call = 0; call < 40; call += 1) {
        await sleep(clock, random() * 10_000);
        const controller = new AbortController();
        const patience = clock.setTimer(() => controller.abort(new Error('impatient')), random() * 5_000);
        waiting += 1;
        try {
          const token = await login.get(random() < 0.5 ? { signal: controller.signal } : {});
          expect(refused.has(token)).toBe(false);
          expect(clock.monotonic()).toBeLessThanOrEqual(validUntil.get(token)!);
          if (random() < 0.1) {
            // To be refused takes a request.
            await sleep(clock, 1 + random() * 100);
            refused.add(token);
            login.invalidate(token);
          }
        } catch (error) {
          if (!MillraceError.is(error)) expect(error).toEqual(new Error('impatient'));
        } finally {
          waiting -= 1;
          patience.cancel();
        }
      }
    };
    const callers = watch(Promise.all(Array.from({ length: 4 }, caller)));
    await clock.runUntil(() => callers.value !== undefined || callers.error !== undefined);
    expect(callers.error).toBeUndefined();
    expect(waiting).toBe(0);
    expect(dds.maxUnderWay).toBe(1);
    await login.close();
    expect(clock.pending).toBe(0);
  }
}, 60_000);
