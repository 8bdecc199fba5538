import { MillraceError, sleep, type Random } from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { describe, expect, test } from 'vitest';
import { openLogin } from './login.ts';
import { openRegistration, type Registration, type RegistrationOptions } from './registration.ts';
import {
  KEY,
  ScriptedDds,
  WALLET,
  hang,
  memoryLog,
  statusError,
  transportError,
} from './scripted-dds.test.support.ts';

const CREDENTIALS = 'M2Y2YzFkMGUtN2E1NS00YzVlLTlmMGItMmQ4YTY0YjFjN2U5OnMzY3IzdC12YWx1ZQ==';

interface World {
  readonly clock: SimulatedClock;
  readonly dds: ScriptedDds;
  readonly log: ReturnType<typeof memoryLog>;
  readonly open: (options?: Partial<RegistrationOptions>) => Registration;
}

/** Backoff factor 1 and whole seconds, unless a test brings its own random. */
function world(random: Random = () => 0.5): World {
  const clock = new SimulatedClock();
  const dds = new ScriptedDds(clock);
  const log = memoryLog();
  return {
    clock,
    dds,
    log,
    open: (options = {}) =>
      openRegistration({
        dds,
        privateKeyHex: KEY,
        wallet: WALLET,
        credentials: CREDENTIALS,
        capabilities: ['/b/v1', '/a/v1', '/b/v1'],
        labels: {},
        version: '1.2.3',
        maxConcurrency: 1,
        intervalMs: 120_000,
        maxRetry: -1,
        repeatEveryMs: () => null,
        clock,
        random,
        log: log.log,
        ...options,
      }),
  };
}

/** Seconds at which attempts began. */
const attempts = (dds: ScriptedDds): number[] => dds.at('nonce').map((at) => at / 1000);

describe('what is sent', () => {
  test('the first attempt is immediate: a nonce, then the signed registration with sorted capabilities', async () => {
    const { clock, dds, open } = world();
    const registration = open();
    expect(registration.state).toBe('registering');
    await registration.waitRegistered();
    expect(registration.state).toBe('registered');
    expect(clock.monotonic()).toBe(0);
    expect(dds.calls.map(({ call }) => call)).toEqual(['nonce', 'register']);
    expect(dds.registrations).toEqual([
      {
        message: expect.stringContaining(`\n${WALLET}\n\nURI: `) as unknown,
        signature: expect.stringMatching(/^0x[0-9a-f]{130}$/) as unknown,
        registration_credentials: CREDENTIALS,
        capabilities: ['/a/v1', '/b/v1'],
        version: '1.2.3',
      },
    ]);
    await registration.close();
  });

  test('labels, a concurrency above 1 and resources are added', async () => {
    const { dds, open } = world();
    const resources = { cpu: 4, memory: 2 ** 34 };
    const registration = open({ labels: { gpu: 'none' }, maxConcurrency: 2, resources });
    await registration.waitRegistered();
    expect(dds.registrations[0]).toMatchObject({
      labels: { gpu: 'none' },
      max_concurrency: 2,
      resources,
    });
    await registration.close();
  });

  test('a version that is no SemVer is replaced and warned of', async () => {
    const { dds, log, open } = world();
    const registration = open({ version: 'dev' });
    await registration.waitRegistered();
    expect(dds.registrations[0]?.version).toMatch(/^\d+\.\d+\.\d+/);
    expect(log.lines.find(({ level }) => level === 'warn')).toMatchObject({ configured: 'dev' });
    await registration.close();
  });
});

describe('a registered node', () => {
  test('is parked: no traffic while nothing happens', async () => {
    const { clock, dds, open } = world();
    const registration = open();
    await clock.advance(86_400_000);
    expect(dds.calls).toHaveLength(2);
    await registration.close();
  });

  test('registers again every so often once the service asks for it, and stops when it no longer does', async () => {
    const { clock, dds, open } = world();
    let every: number | null = null;
    const registration = open({ repeatEveryMs: () => every });
    await clock.advance(7_000);
    every = 120_000;
    await clock.advance(360_000);
    expect(attempts(dds)).toEqual([0, 120, 240, 360]);
    every = null;
    await clock.advance(600_000);
    expect(attempts(dds).length).toBeLessThanOrEqual(5);
    await registration.close();
  });

  test('registers at most once a second, whatever repetition is asked for', async () => {
    const { clock, dds, open } = world();
    const registration = open({ repeatEveryMs: () => 0 });
    await clock.advance(10_000);
    expect(attempts(dds)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    await registration.close();
  });

  test.each([transportError(), statusError('register', 409), statusError('register', 403)])(
    'stays registered when a repetition fails, and tries again (%s)',
    async (error) => {
      const { clock, dds, open } = world();
      const registration = open({ repeatEveryMs: () => 300_000 });
      await clock.advance(299_999);
      dds.before = (call) => {
        if (call === 'register') throw error;
      };
      await clock.advance(1_000_000);
      expect(registration.state).toBe('registered');
      await registration.waitRegistered();
      const [, , first, second] = attempts(dds);
      expect(second! - first!).toBeLessThanOrEqual(120);
      await registration.close();
    },
  );
});

describe('failures', () => {
  const TRANSIENT: [string, MillraceError][] = [
    ['transport', transportError()],
    [
      'an undecodable answer',
      new MillraceError('data_loss', 'no JSON', { retryable: true, details: { status: 200 } }),
    ],
    [
      'an answer that is too large',
      new MillraceError('resource_exhausted', 'too large', { details: { status: 200 } }),
    ],
    ...[408, 429, 500, 502, 503, 504, 599].map((status): [string, MillraceError] => [
      `status ${status}`,
      statusError('nonce', status),
    ]),
  ];

  test.each(TRANSIENT)('%s, from either endpoint: 2, 4, 8 ... 60 s', async (_title, error) => {
    for (const failing of ['nonce', 'register'] as const) {
      const { clock, dds, open } = world();
      dds.before = (call) => {
        if (call === failing) throw error;
      };
      const registration = open();
      await clock.advance(300_000);
      expect(attempts(dds)).toEqual([0, 2, 6, 14, 30, 62, 122, 182, 242]);
      expect(registration.state).toBe('registering');
      await registration.close();
    }
  });

  test('the backoff factor is uniform in 0.8 to 1.2', async () => {
    for (const [draw, seconds] of [
      [0, [0, 1.6, 4.8]],
      [1 - 2 ** -32, [0, 2.4, 7.2]],
    ] as const) {
      const { clock, dds, open } = world(() => draw);
      dds.before = () => {
        throw transportError();
      };
      const registration = open();
      await clock.advance(8_000);
      expect(attempts(dds).map((at) => Math.round(at * 1000) / 1000)).toEqual(seconds);
      await registration.close();
    }
  });

  test.each([
    ['conflict', 409],
    ['slow', 400],
    ['slow', 401],
    ['slow', 403],
    ['slow', 404],
    ['slow', 422],
    ['slow', 302],
  ])('%s: status %i from either endpoint costs a cooldown', async (_kind, status) => {
    for (const failing of ['nonce', 'register'] as const) {
      const { clock, dds, open } = world();
      dds.before = (call) => {
        if (call === failing) throw statusError(failing, status);
      };
      const registration = open({ intervalMs: 90_000 });
      await clock.advance(200_000);
      expect(attempts(dds)).toEqual([0, 90, 180]);
      await registration.close();
    }
  });

  test('a cooldown is at least a second', async () => {
    const { clock, dds, open } = world();
    dds.before = () => {
      throw statusError('nonce', 409);
    };
    const registration = open({ intervalMs: 0 });
    await clock.advance(3_000);
    expect(attempts(dds)).toEqual([0, 1, 2, 3]);
    await registration.close();
  });

  test('no capabilities: nothing is sent, ever', async () => {
    const { clock, dds, log, open } = world();
    const registration = open({ capabilities: [] });
    await clock.advance(3_600_000);
    expect(dds.calls).toEqual([]);
    expect(registration.state).toBe('registering');
    expect(JSON.stringify(log.lines)).toContain('capabilities must not be empty');
    await registration.close();
  });

  test('a bug in a call is a slow failure and not the end of the loop', async () => {
    const { clock, dds, open } = world();
    let broken = true;
    dds.before = () => {
      if (broken) throw new TypeError('x is undefined');
    };
    const registration = open();
    await clock.advance(120_000 - 1);
    broken = false;
    await clock.advance(1);
    expect(registration.state).toBe('registered');
    await registration.close();
  });

  test.each([
    [0, [0, 100, 200, 300]],
    [1, [0, 100, 200, 300]],
    [2, [0, 2, 102, 104, 204, 206, 306]],
    [3, [0, 2, 6, 106, 108, 112, 212, 214, 218]],
  ])('REGISTER_MAX_RETRY %i: every so many transient failures one cooldown', async (maxRetry, seconds) => {
    const { clock, dds, open } = world();
    dds.before = () => {
      throw transportError();
    };
    const registration = open({ maxRetry, intervalMs: 100_000 });
    await clock.advance(307_000);
    expect(attempts(dds)).toEqual(seconds);
    await registration.close();
  });

  test('a conflict or slow outcome starts the count of transient ones anew', async () => {
    const { clock, dds, open } = world();
    const outcomes = [transportError(), transportError(), statusError('nonce', 409), transportError(), null];
    dds.before = (call) => {
      const error = call === 'nonce' ? outcomes.shift() : null;
      if (error) throw error;
    };
    const registration = open();
    await clock.runUntil(() => registration.state === 'registered');
    expect(attempts(dds)).toEqual([0, 2, 6, 126, 128]);
    await registration.close();
  });

  test('Retry-After is kept to when it is longer than the backoff', async () => {
    const { clock, dds, open } = world();
    dds.before = () => {
      throw statusError('nonce', 429, { retry_after_ms: 45_000 });
    };
    const registration = open();
    await clock.advance(200_000);
    expect(attempts(dds)).toEqual([0, 45, 90, 135, 180]);
    await registration.close();
  });

  test('a service that is down for a minute at the start costs no more than the next backoff', async () => {
    const { clock, dds, open } = world(seededRandom(7));
    dds.before = () => {
      if (clock.monotonic() < 60_000) throw transportError();
    };
    const registration = open();
    await clock.runUntil(() => registration.state === 'registered');
    expect(clock.monotonic()).toBeLessThanOrEqual(60_000 + 1.2 * 32_000);
    await registration.close();
  });
});

describe('warnings', () => {
  const warned = (log: World['log']): number => log.lines.filter(({ level }) => level === 'warn').length;

  test.each([statusError('register', 409), statusError('register', 403), transportError()])(
    'repeated failures of one kind are warned of at most every 180 s (%s)',
    async (error) => {
      const { clock, dds, log, open } = world();
      dds.before = (call) => {
        if (call === 'register') throw error;
      };
      const registration = open({ intervalMs: 60_000 });
      await clock.advance(179_999);
      expect(warned(log)).toBe(1);
      await clock.advance(61_000);
      expect(warned(log)).toBe(2);
      await clock.advance(3_600_000 - 241_000);
      expect(warned(log)).toBeLessThanOrEqual(20);
      await registration.close();
    },
  );

  test('a failure of another kind is warned of at once', async () => {
    const { clock, dds, log, open } = world();
    const errors = [statusError('nonce', 409), statusError('nonce', 401)];
    dds.before = () => {
      const error = errors.shift();
      if (error) throw error;
    };
    const registration = open({ intervalMs: 5_000 });
    await clock.advance(10_000);
    expect(warned(log)).toBe(2);
    await registration.close();
  });

  test('no line holds the credentials, the key or a signature', async () => {
    const { clock, dds, log, open } = world();
    const registration = open();
    await clock.advance(0);
    registration.lost();
    dds.before = (call) => {
      if (call === 'register') throw statusError('register', 403);
    };
    await clock.advance(1_000_000);
    const told = JSON.stringify(log.lines);
    expect(log.lines.length).toBeGreaterThan(3);
    expect(told).not.toContain(CREDENTIALS.slice(0, 12));
    expect(told).not.toContain(KEY.slice(0, 12));
    expect(told).not.toMatch(/0x[0-9a-f]{64}/);
    await registration.close();
  });
});

describe('lost', () => {
  test('registers again within a second, and waiting works again', async () => {
    const { clock, dds, open } = world();
    const registration = open();
    await clock.advance(600_000);
    registration.lost();
    expect(registration.state).toBe('disconnected');
    const waiting = registration.waitRegistered();
    await clock.advance(0);
    await waiting;
    expect(attempts(dds)).toEqual([0, 600]);
    expect(registration.state).toBe('registered');
    await registration.close();
  });

  test('a service that forgets the node after each registration is asked once a second', async () => {
    const { clock, dds, open } = world();
    const registration = open();
    for (let step = 0; step < 100; step += 1) {
      await clock.advance(100);
      registration.lost();
      registration.lost();
    }
    expect(attempts(dds)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    await registration.close();
  });

  test('has no effect before the node is registered', async () => {
    const { clock, dds, open } = world();
    dds.before = () => {
      throw statusError('nonce', 409);
    };
    const registration = open();
    await clock.advance(50_000);
    registration.lost();
    expect(registration.state).toBe('registering');
    await clock.advance(69_999);
    expect(attempts(dds)).toEqual([0]);
    await registration.close();
  });

  test('cuts the cooldown of a failed repetition short', async () => {
    const { clock, dds, open } = world();
    const registration = open({ repeatEveryMs: () => 100_000 });
    await clock.advance(99_000);
    let refused = false;
    dds.before = (call) => {
      if (call === 'register' && !refused) {
        refused = true;
        throw statusError('register', 403);
      }
    };
    await clock.advance(11_000);
    registration.lost();
    await clock.advance(0);
    expect(attempts(dds)).toEqual([0, 100, 110]);
    expect(registration.state).toBe('registered');
    await registration.close();
  });

  test('wired to a login, a node the service forgot comes back by itself', async () => {
    const { clock, dds, log, open } = world();
    const registration = open();
    await using login = openLogin({
      dds,
      privateKeyHex: KEY,
      wallet: WALLET,
      config: { tokenSafetyRatio: 0.75, tokenReauthMaxRetries: 3, tokenReauthJitterMs: 500 },
      clock,
      random: () => 0.5,
      log: log.log,
      onRegistrationLost: () => registration.lost(),
    });
    await registration.waitRegistered();
    await login.get();
    await clock.advance(600_000);
    let forgotten = true;
    dds.before = (call) => {
      if (call === 'register') forgotten = false;
      if (call === 'verify' && forgotten) throw statusError('verify', 403);
    };
    await clock.advance(2_110_000);
    expect(dds.registrations).toHaveLength(2);
    expect(dds.tokens).toBe(2);
    await registration.close();
  });
});

describe('told by the service', () => {
  test('ends the waiting and the attempts, until the registration is lost', async () => {
    const { clock, dds, open } = world();
    dds.before = (call) => {
      if (call === 'register') throw statusError('register', 403);
    };
    const registration = open();
    await clock.advance(10_000);
    const waiting = registration.waitRegistered();
    expect(registration.told()).toBe(true);
    await waiting;
    expect(registration.state).toBe('registered');
    await clock.advance(1_000_000);
    expect(attempts(dds)).toEqual([0]);
    registration.lost();
    expect(registration.state).toBe('disconnected');
    await clock.advance(0);
    expect(attempts(dds)).toEqual([0, 1010]);
    await registration.close();
    expect(registration.told()).toBe(false);
  });

  test('in the middle of an attempt that then fails, it stays registered', async () => {
    const { clock, dds, open } = world();
    dds.before = async (call, signal) => {
      if (call !== 'register') return;
      await sleep(clock, 1_000, signal);
      throw transportError();
    };
    const registration = open();
    await clock.advance(500);
    registration.told();
    await clock.advance(1_000_000);
    expect(registration.state).toBe('registered');
    expect(attempts(dds)).toEqual([0]);
    await registration.close();
  });

  test('changes nothing for a node that is registered', async () => {
    const { clock, dds, open } = world();
    const registration = open({ repeatEveryMs: () => 100_000 });
    await clock.advance(50_000);
    expect(registration.told()).toBe(true);
    await clock.advance(50_000);
    expect(attempts(dds)).toEqual([0, 100]);
    await registration.close();
  });
});

describe('waiting and closing', () => {
  test('each wait can be cancelled by itself', async () => {
    const { clock, dds, open } = world();
    dds.before = () => sleep(clock, 1_000);
    const registration = open();
    const controller = new AbortController();
    const cancelled = registration.waitRegistered(controller.signal).catch((error: unknown) => error);
    const other = registration.waitRegistered(new AbortController().signal);
    await clock.advance(500);
    const reason = new MillraceError('canceled', 'stop');
    controller.abort(reason);
    expect(await cancelled).toBe(reason);
    await clock.advance(1_500);
    await other;
    await expect(registration.waitRegistered(AbortSignal.abort(reason))).rejects.toBe(reason);
    await registration.close();
  });

  test.each(['an attempt', 'a backoff', 'a cooldown', 'parking'])(
    'closing in the middle of %s ends it and all waits, and leaves no timer',
    async (moment) => {
      const { clock, dds, open } = world();
      dds.before = async (_call, signal) => {
        if (moment === 'an attempt') await hang(clock, signal);
        if (moment === 'a backoff') throw transportError();
        if (moment === 'a cooldown') throw statusError('nonce', 409);
      };
      const registration = open();
      await clock.advance(500);
      const waiting =
        moment === 'parking'
          ? Promise.resolve('none')
          : registration.waitRegistered().catch((error: unknown) => MillraceError.from(error).code);
      await Promise.all([registration.close(), registration.close()]);
      expect(await waiting).toBe(moment === 'parking' ? 'none' : 'canceled');
      expect(clock.pending).toBe(0);
      expect(dds.underWay).toBe(0);
      registration.lost();
      await expect(registration.waitRegistered()).rejects.toMatchObject({ code: 'canceled' });
      await clock.advance(1_000_000);
      expect(dds.at('nonce')).toHaveLength(1);
      await registration[Symbol.asyncDispose]();
    },
  );
});
