import { PassThrough } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { systemClock } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  Programs,
  WirePeer,
  alive,
  hello,
  kill,
  run,
  shutdown,
  spawnPeer,
} from '../programs.test.support.ts';
import { encodeFrame, encodeLength } from '../wire/frames.ts';
import type { Response } from '../wire/messages.ts';
import { RuntimeError } from './runtime-error.ts';
import { defineRuntime, type RuntimeContext, type RuntimeDefinition } from './runtime.ts';
import { RuntimeServer } from './server.ts';

interface Served {
  readonly peer: WirePeer;
  readonly server: RuntimeServer;
  readonly exit: Promise<number>;
  /** Lines for stderr. */
  readonly complaints: string[];
}

/** A server in this process, over streams. */
function serve(definition: Partial<RuntimeDefinition>): Served {
  const runtime = defineRuntime({
    name: 'probe',
    version: '1.2.3',
    runCommand: (ctx: RuntimeContext) => ctx.command(() => undefined),
    ...definition,
  });
  const input = new PassThrough();
  const output = new PassThrough();
  const complaints: string[] = [];
  const server = new RuntimeServer(
    runtime,
    { input, output },
    { clock: systemClock, complain: (line) => complaints.push(line) },
  );
  const context = {
    emitter: server.emitter,
    signal: server.signal,
    control: { shutdown: () => server.shutdown() },
    command: (handler) => server.command(handler),
  } as Partial<RuntimeContext> as RuntimeContext;
  const exit = server.serve(context);
  const peer = new WirePeer({ readable: output, writable: input, closed: exit.then(() => delay(10)) });
  return { peer, server, exit, complaints };
}

const errorOf = ({ command }: Response): { code: number; message: string } => {
  if (command.case !== 'error') throw new Error(`not an error but ${command.case}`);
  return { code: command.value.code, message: command.value.message };
};
const hex = (text: string): Buffer => Buffer.from(text.replaceAll(' ', ''), 'hex');

let programs: Programs;
beforeAll(async () => {
  programs = await Programs.open();
});
afterAll(() => programs[Symbol.asyncDispose]());

describe('a session', () => {
  test('is byte for byte as captured from the deployed programs', async () => {
    const { peer, exit } = serve({
      start: () => ({ exampleProperty: 'running' }),
      runCommand: (ctx, { entryPoint, argv0, args }) =>
        ctx.command((command) => command.stdout(`${[entryPoint, argv0, ...args].join(' ')}\n`)),
    });
    peer.write(hex('0b 08 02 12 07 0a 05 30 2e 31 2e 30'));
    await peer.answer(2n);
    peer.write(hex('1b 08 03 52 17 0a 09 2f 62 69 6e 2f 65 63 68 6f 12 04 65 63 68 6f 12 01 61 12 01 62'));
    await peer.stopped(1n);
    peer.write(hex('04 08 0a 62 00'));
    await peer.answer(10n);
    peer.end();
    expect(await exit).toBe(0);
    expect(peer.received.toString('hex')).toBe(
      hex(
        '26 08 01 a2 01 21 10 01 22 1d 7b 22 65 78 61 6d 70 6c 65 50 72 6f 70 65 72 74 79 22 3a 22 72 75 6e 6e 69 6e 67 22 7d' +
          '0b 10 02 22 07 0a 05 31 2e 32 2e 33' +
          '06 10 03 52 02 08 01' +
          '09 08 01 a2 01 04 08 01 10 01' +
          '1e 08 01 a2 01 19 08 01 10 01 22 13 2f 62 69 6e 2f 65 63 68 6f 20 65 63 68 6f 20 61 20 62 0a' +
          '07 08 01 a2 01 02 08 01' +
          '04 10 0a 62 00',
      ).toString('hex'),
    );
  });

  test('gives the first command pid 0 when start says nothing', async () => {
    const { peer } = serve({});
    peer.send(run(2n, 'x'));
    expect((await peer.answer(2n)).command).toMatchObject({ case: 'run', value: { pid: 0n } });
    expect(await peer.stopped(0n)).toBe(0);
  });

  test('answers hello after start, and tells what start emits while it works', async () => {
    let finish!: () => void;
    const { peer } = serve({
      start: async (ctx) => {
        for (let index = 0; index < 10; index += 1) await ctx.emitter!.state('phase', index);
        await ctx.emitter!.counter('golem.usage.custom', 1.5);
        await new Promise<void>((resolve) => (finish = resolve));
        return 'ready';
      },
    });
    peer.send(hello(2n));
    await peer.until(() => peer.responses.length === 11, 'eleven events');
    finish();
    await peer.answer(2n);
    expect(peer.responses.map(({ command }) => command.case)).toEqual([
      ...Array(11).fill('rtStatus'),
      'status',
      'hello',
    ]);
    expect(peer.stdoutOf(0n)).toBe('ready');
    expect(peer.received.toString('hex')).toContain(
      '240801aa011f121d0a12676f6c656d2e75736167652e637573746f6d11000000000000f83f',
    );
  });

  test('handles requests at the same time: a slow run delays neither hello nor kill', async () => {
    let finish!: (pid: number) => void;
    const { peer } = serve({ runCommand: () => new Promise<number>((resolve) => (finish = resolve)) });
    peer.send(run(2n, 'slow'), hello(3n), kill(4n, 99n));
    await peer.answer(3n);
    expect(errorOf(await peer.answer(4n))).toEqual({ code: 1, message: 'no command has the pid 99' });
    finish(7);
    expect((await peer.answer(2n)).command).toMatchObject({ case: 'run', value: { pid: 7n } });
  });

  test('of a thousand runs in one write answers each before its events and ends each once', async () => {
    const { peer } = serve({
      runCommand: async (ctx, { args }) => {
        const pid = ctx.command(async (command) => {
          await command.stdout(args[0]!);
          return args[0];
        });
        // Some answers take long, others are given at once.
        if (Number(args[0]) % 3 === 0) await new Promise((resolve) => setImmediate(resolve));
        return pid;
      },
    });
    const count = 1000n;
    peer.send(
      ...Array.from({ length: Number(count) }, (_, index) => run(BigInt(index) + 2n, 'x', String(index))),
    );
    for (let pid = 0n; pid < count; pid += 1n) await peer.stopped(pid);
    const answered = new Set<bigint>();
    for (const { command } of peer.responses) {
      if (command.case === 'run') answered.add(command.value.pid);
      else if (command.case === 'status') expect(answered).toContain(command.value.pid);
    }
    expect(answered.size).toBe(Number(count));
    for (let pid = 0n; pid < count; pid += 1n) {
      const statuses = peer.statuses(pid);
      expect(statuses.filter(({ running }) => !running)).toHaveLength(1);
      expect(statuses.at(-1)!.running).toBe(false);
      expect(statuses[0]).toMatchObject({ running: true, stdout: '' });
    }
  });

  test('answers ids that are zero, reused or of 64 bits, each request once', async () => {
    const { peer } = serve({});
    const huge = 2n ** 64n - 1n;
    peer.send(hello(0n), hello(5n), hello(5n), hello(huge));
    await peer.answer(huge);
    expect(peer.responses.map(({ id }) => id)).toEqual([0n, 5n, 5n, huge]);
  });

  test('answers a request without a known command with code 0 and "unknown command"', async () => {
    const { peer } = serve({});
    peer.write(hex('02 08 07 05 08 08 9a 06 00'));
    expect(errorOf(await peer.answer(7n))).toEqual({ code: 0, message: 'unknown command' });
    expect(errorOf(await peer.answer(8n))).toEqual({ code: 0, message: 'unknown command' });
  });

  test('maps networks both ways, and refuses them without a handler', async () => {
    let seen: unknown;
    const { peer } = serve({
      joinNetwork: (_ctx, network) => {
        seen = network;
        return { tcpListener: '127.0.0.1:5000' };
      },
    });
    const network = { addr: '10.0.0.0', gateway: '', mask: '255.255.255.0', ifAddr: '10.0.0.2' };
    const request = { networks: [network], hosts: { a: '10.0.0.1' }, interface: 1 };
    peer.send({ id: 2n, command: { case: 'network', value: request } });
    expect((await peer.answer(2n)).command.value).toMatchObject({
      endpoint: { case: 'tcpListener', value: '127.0.0.1:5000' },
    });
    expect(seen).toEqual({ interface: 'inet', networks: [network], hosts: { a: '10.0.0.1' } });
    const without = serve({}).peer;
    without.send({ id: 2n, command: { case: 'network', value: {} } });
    expect(errorOf(await without.answer(2n))).toEqual({ code: 2, message: 'Not supported' });
  });
});

describe('a command', () => {
  test('that throws ends with code 1 and its message on stderr; a RuntimeError has its own code', async () => {
    const { peer } = serve({
      runCommand: (ctx, { entryPoint }) =>
        ctx.command(() => {
          throw entryPoint === 'plain' ? new Error('broken') : new RuntimeError('refused', { exitCode: 42 });
        }),
    });
    peer.send(run(2n, 'plain'), run(3n, 'coded'));
    expect([await peer.stopped(0n), await peer.stopped(1n)]).toEqual([1, 42]);
    expect([peer.stderrOf(0n), peer.stderrOf(1n)]).toEqual(['broken\n', 'refused\n']);
  });

  test('that was never started is an error answer with the kind of the error', async () => {
    const { peer } = serve({
      runCommand: (_ctx, { entryPoint }) => {
        if (entryPoint === 'pid') return -1;
        throw new RuntimeError(`no ${entryPoint}`, { kind: 'not_found', context: { path: '/bin' } });
      },
    });
    peer.send(run(2n, 'x'), run(3n, 'pid'));
    expect((await peer.answer(2n)).command).toMatchObject({
      case: 'error',
      value: { code: 1, message: 'no x', context: { path: '/bin' } },
    });
    expect(errorOf(await peer.answer(3n)).message).toContain('a pid must be a whole number');
  });

  test('has its large output cut into events of 64 KiB, in order', async () => {
    const { peer } = serve({
      runCommand: (ctx) => ctx.command((command) => command.stdout(Buffer.alloc(200_000, 'x'))),
    });
    peer.send(run(2n, 'x'));
    await peer.stopped(0n);
    expect(peer.statuses(0n).map(({ stdout }) => stdout.length)).toEqual([0, 65536, 65536, 65536, 3392, 0]);
  });

  test('is ended by a kill through its signal, with 128 + the signal', async () => {
    const { peer } = serve({
      runCommand: (ctx) => ctx.command(({ signal }) => delay(60_000, undefined, { signal })),
    });
    peer.send(run(2n, 'x'), run(3n, 'y'));
    await peer.answer(3n);
    peer.send(kill(4n, 0n, 15), kill(5n, 1n, 0));
    expect((await peer.answer(4n)).command.case).toBe('kill');
    expect([await peer.stopped(0n), await peer.stopped(1n)]).toEqual([143, 143]);
    peer.send(kill(6n, 0n));
    expect(errorOf(await peer.answer(6n)).code).toBe(1);
  });

  test('that ignores its signal is over for the supervisor after signal 9, and says nothing more', async () => {
    let go!: () => void;
    let wrote!: () => void;
    const done = new Promise<void>((resolve) => (wrote = resolve));
    const { peer } = serve({
      runCommand: (ctx) =>
        ctx.command(async (command) => {
          await new Promise<void>((resolve) => (go = resolve));
          await command.stdout('late');
          wrote();
        }),
    });
    peer.send(run(2n, 'x'));
    await peer.answer(2n);
    await new Promise((resolve) => setImmediate(resolve));
    peer.send(kill(3n, 0n, 9));
    expect(await peer.stopped(0n)).toBe(137);
    go();
    await done;
    peer.send(hello(4n));
    await peer.answer(4n);
    expect(peer.statuses(0n).at(-1)).toMatchObject({ running: false });
    expect(peer.stdoutOf(0n)).toBe('');
  });

  test("can be killed by the author's own handler instead", async () => {
    const kills: unknown[] = [];
    const { peer } = serve({ killCommand: (_ctx, request) => void kills.push(request) });
    peer.send(kill(2n, 2n ** 63n, 9));
    await peer.answer(2n);
    expect(kills).toEqual([{ pid: 2n ** 63n, signal: 9 }]);
  });

  test('takes the programs it spawned with it, and their children', async () => {
    const { peer } = serve({
      runCommand: (ctx) =>
        ctx.command((command) =>
          command.spawn('sh', ['-c', 'trap "" TERM; sleep 600 & echo $$ $!; wait; wait']),
        ),
    });
    peer.send(run(2n, 'sh'));
    const pids = (await peer.until(() => /^(\d+) (\d+)\n/.exec(peer.stdoutOf(0n)), 'pids'))
      .slice(1)
      .map(Number);
    peer.send(kill(3n, 0n, 15));
    expect(await peer.stopped(0n)).toBe(143);
    for (const pid of pids) expect(alive(pid)).toBe(false);
  });

  test('ends with the exit code of the program it spawned, or 127 when there is none', async () => {
    const { peer } = serve({
      runCommand: (ctx, { args }) =>
        ctx.command(async (command) => {
          await command.spawn(args[0]!, args.slice(1));
        }),
    });
    peer.send(
      run(2n, 'x', 'sh', '-c', 'echo out; echo err >&2; exit 3'),
      run(3n, 'x', '/nowhere'),
      run(4n, 'x', 'sh', '-c', 'kill -9 $$'),
    );
    expect([await peer.stopped(0n), await peer.stopped(1n), await peer.stopped(2n)]).toEqual([3, 127, 137]);
    expect([peer.stdoutOf(0n), peer.stderrOf(0n)]).toEqual(['out\n', 'err\n']);
    expect(peer.stderrOf(1n)).toContain('/nowhere cannot be started');
  });

  test('refuses counters that are no amounts', async () => {
    const { peer } = serve({
      runCommand: (ctx) => ctx.command((command) => command.counter('x', Number.NaN)),
    });
    peer.send(run(2n, 'x'));
    expect(await peer.stopped(0n)).toBe(1);
    expect(peer.stderrOf(0n)).toContain('must have a name and a number >= 0, got NaN');
  });
});

describe('stopping', () => {
  const counting = (): { stops: number; definition: Partial<RuntimeDefinition> } => {
    const counted = { stops: 0, definition: {} as Partial<RuntimeDefinition> };
    counted.definition = {
      stop: () => {
        counted.stops += 1;
      },
      runCommand: (ctx) => ctx.command(({ signal }) => delay(60_000, undefined, { signal })),
    };
    return counted;
  };

  test('on Shutdown calls stop, ends commands, answers, refuses new runs, and leaves at the end of input', async () => {
    const counted = counting();
    const { peer, exit } = serve(counted.definition);
    peer.send(run(2n, 'x'));
    await peer.answer(2n);
    peer.send(shutdown(3n));
    expect((await peer.answer(3n)).command.case).toBe('shutdown');
    expect(peer.statuses(0n).at(-1)).toMatchObject({ running: false, returnCode: 143 });
    peer.send(run(4n, 'y'), shutdown(5n));
    expect(errorOf(await peer.answer(4n))).toEqual({ code: 2, message: 'the runtime is stopping' });
    expect((await peer.answer(5n)).command.case).toBe('shutdown');
    peer.end();
    expect(await exit).toBe(0);
    expect(counted.stops).toBe(1);
  });

  test.each([
    ['the end of input', ({ peer }: Served) => peer.end(), 0],
    ['control.shutdown()', ({ server }: Served) => server.shutdown(), 0],
    ['a signal', ({ server }: Served) => server.onSignal(143), 143],
    ['an error nobody caught', ({ server }: Served) => server.onUncaught(new Error('lost')), 1],
  ])('on %s calls stop once, ends commands and exits', async (_name, cause, code) => {
    const counted = counting();
    const served = serve(counted.definition);
    served.peer.send(run(2n, 'x'));
    await served.peer.answer(2n);
    cause(served);
    served.server.shutdown();
    expect(await served.exit).toBe(code);
    expect(counted.stops).toBe(1);
    expect(await served.peer.stopped(0n)).toBe(143);
  });

  test('does not wait for a start that hangs', async () => {
    const { peer, exit } = serve({ start: () => new Promise(() => undefined) });
    peer.send(hello(2n), shutdown(3n));
    expect((await peer.answer(3n)).command.case).toBe('shutdown');
    peer.end();
    expect(await exit).toBe(0);
  });

  test('answers with an error when stop takes longer than the window, and exits with 1', async () => {
    const { peer, exit } = serve({ stopTimeoutMs: 50, stop: () => new Promise(() => undefined) });
    peer.send(shutdown(2n));
    expect(errorOf(await peer.answer(2n))).toEqual({ code: 0, message: 'stop did not finish within 50 ms' });
    expect(await exit).toBe(1);
  });

  test('ends a command that ignores its signal at the end of the window', async () => {
    const { peer, exit } = serve({
      stopTimeoutMs: 50,
      runCommand: (ctx) => ctx.command(() => new Promise(() => undefined)),
    });
    peer.send(run(2n, 'x'));
    await peer.answer(2n);
    peer.end();
    expect(await exit).toBe(1);
    expect(await peer.stopped(0n)).toBe(137);
  });

  test('tells a stop that failed, and exits with 1', async () => {
    const { peer, exit } = serve({
      stop: () => {
        throw new Error('still mounted');
      },
    });
    peer.send(shutdown(2n));
    expect(errorOf(await peer.answer(2n)).message).toBe('stop failed: still mounted (code: 1)');
    expect(await exit).toBe(1);
  });
});

describe('bytes that are no requests', () => {
  test.each([
    ['text', Buffer.from('hello, runtime\n')],
    ['a frame of garbage', encodeFrame(Buffer.from('ffffffff', 'hex'))],
    ['a length of 4 GiB', hex('80 80 80 80 10')],
    ['a length that never ends', Buffer.alloc(11, 0xff)],
    ['a length a byte above the limit', encodeLength(16 * 1024 * 1024 + 1)],
  ])('%s stop the runtime with code 1 and a message', async (_name, bytes) => {
    let stops = 0;
    const { peer, exit, complaints } = serve({
      stop: () => {
        stops += 1;
      },
    });
    peer.send(hello(2n));
    await peer.answer(2n);
    peer.write(bytes);
    peer.end();
    expect(await exit).toBe(1);
    expect(stops).toBe(1);
    expect(complaints[0]).toMatch(/^Error: the input is not the protocol: /);
  });

  test('a frame cut by the end of input stops it with code 1', async () => {
    const { peer, exit, complaints } = serve({});
    peer.write(hex('0b 08 02 12'));
    peer.end();
    expect(await exit).toBe(1);
    expect(complaints).toEqual([expect.stringContaining('middle of a frame')]);
  });

  test('padded lengths and frames cut at every byte are read', async () => {
    const { peer } = serve({});
    for (const byte of hex('8b 80 00 08 02 12 07 0a 05 30 2e 31 2e 30')) peer.write(Uint8Array.of(byte));
    expect((await peer.answer(2n)).command.case).toBe('hello');
  });
});

describe('a runtime as a process', () => {
  const STRAY = `
    import fs from 'node:fs'; import cp from 'node:child_process'; import { writeSync } from 'node:fs';
    const kept = process.stdout; const keptWrite = process.stdout.write;
    function stray() {
      console.log('stray-1'); console.info('stray-2'); console.table([1]);
      process.stdout.write('stray-3\\n'); kept.write('stray-4\\n'); process.stdout.end('stray-5\\n'); kept.end('stray-6\\n');
      fs.writeSync(1, 'stray-7\\n'); writeSync(1, 'stray-8\\n'); fs.writeFileSync(1, 'stray-9\\n'); fs.write(1, 'stray-10\\n', () => {});
      cp.execFileSync('echo', ['stray-11'], { stdio: 'inherit' }); cp.spawnSync('echo', ['stray-12'], { stdio: ['ignore', 1, 2] });
      return new Promise((done) => cp.spawn('echo', ['stray-13'], { stdio: 'inherit' }).on('close', () => done()));
    }`;

  test.each([
    ['a socket', false],
    ['a pipe', true],
  ])('never lets stray output onto a wire that is %s', async (_name, viaPipe) => {
    const runtime = await programs.runtime(
      `start: stray, runCommand: (ctx) => ctx.command(async (command) => { await stray(); await command.stdout('real'); })`,
      STRAY,
    );
    await using spawned = spawnPeer(runtime, undefined, viaPipe);
    const { peer } = spawned;
    peer.send(hello(2n), run(3n, 'x'));
    expect(await peer.stopped(0n)).toBe(0);
    peer.end();
    await spawned.closed;
    expect(peer.broken).toBeNull();
    expect(peer.stdoutOf(0n)).toBe('real');
    expect(peer.received.toString('latin1')).not.toContain('stray');
    for (const text of ['stray-1\n', 'stray-4\n', 'stray-6\n']) expect(peer.stderr).toContain(text);
  });

  test.each([
    ['a socket', false],
    ['a pipe', true],
  ])(
    'does not start after something was printed on a wire that is %s, and says so',
    async (_name, viaPipe) => {
      const runtime = await programs.runtime(`runCommand: () => 0`, `console.log('early');`);
      await using spawned = spawnPeer(runtime, undefined, viaPipe);
      const { code, stderr } = await spawned.closed;
      expect(stderr).toMatch(
        /^Error: 6 bytes were printed on stdout before runRuntime.*; call runRuntime before anything that prints/,
      );
      // Through a pipe it is the code of what reads from it.
      expect(code).toBe(viaPipe ? 0 : 1);
    },
  );

  test.each([
    ['SIGTERM', 143],
    ['SIGINT', 130],
  ] as const)('calls stop on %s and ends the programs it started', async (signal, code) => {
    const runtime = await programs.runtime(
      `stop: () => console.error('stopping'), runCommand: (ctx) => ctx.command((command) => command.spawn('sh', ['-c', 'echo $$; exec sleep 600']))`,
    );
    await using spawned = spawnPeer(runtime);
    spawned.peer.send(run(2n, 'x'));
    const [, pid] = await spawned.peer.until(() => /^(\d+)\n/.exec(spawned.peer.stdoutOf(0n)), 'a pid');
    spawned.child.kill(signal);
    expect(await spawned.closed).toMatchObject({ code, stderr: 'stopping\n' });
    expect(alive(Number(pid))).toBe(false);
  });

  test('that fails to start says so and exits with 1', async () => {
    const runtime = await programs.runtime(
      `start: () => { throw new Error('no KVM'); }, runCommand: () => 0`,
    );
    await using spawned = spawnPeer(runtime);
    spawned.peer.send(hello(2n));
    expect(await spawned.closed).toEqual({
      code: 1,
      signal: null,
      stdout: '',
      stderr: 'Error: Failed to start the runtime: no KVM (code: 1)\n',
    });
  });

  test('stops when nobody reads its output any more', async () => {
    const runtime = await programs.runtime(
      `stop: () => console.error('stopping'), runCommand: (ctx) => ctx.command(async (command) => { for (;;) await command.stdout(Buffer.alloc(65536)); })`,
    );
    await using spawned = spawnPeer(runtime);
    spawned.peer.send(run(2n, 'x'));
    await spawned.peer.answer(2n);
    spawned.child.stdout!.destroy();
    const result = await spawned.closed;
    expect(result.code).toBe(1);
    expect(result.stderr).toContain('the supervisor stopped reading');
    expect(result.stderr).toContain('stopping');
  });

  test('writes everything it has before it exits', async () => {
    const runtime = await programs.runtime(
      `runCommand: (ctx) => ctx.command(async (command) => { void command.stdout(Buffer.alloc(5_000_000, 120)); ctx.control.shutdown(); })`,
    );
    await using spawned = spawnPeer(runtime);
    spawned.peer.send(run(2n, 'x'));
    expect((await spawned.closed).code).toBe(0);
    expect(spawned.peer.stdoutOf(0n)).toHaveLength(5_000_000);
  });
});
