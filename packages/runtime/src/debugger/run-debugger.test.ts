import { readFile, writeFile } from 'node:fs/promises';
import { PassThrough, Writable } from 'node:stream';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Programs } from '../programs.test.support.ts';
import { runDebugger, type DebuggerOptions } from './run-debugger.ts';
import { splitWords } from './words.ts';

let programs: Programs;
let runtime: string;
beforeAll(async () => {
  programs = await Programs.open();
  runtime = await programs.runtime(`
    deploy: () => ({ vols: [{ name: 'v', path: '/data' }] }),
    start: (ctx) => 'args: ' + ctx.cli.command.args.join(' '),
    runCommand: (ctx, run) => ctx.command(async (command) => {
      if (run.entryPoint === 'wait') return new Promise((_, fail) => {
        const timer = setTimeout(() => {}, 60000);
        command.signal.addEventListener('abort', () => { clearTimeout(timer); fail(command.signal.reason); });
      });
      await command.counter('probe.words', run.args.length);
      await command.state('phase', 'echo');
      await command.stderr('careful\\n');
      return run.args;
    })`);
});
afterAll(() => programs[Symbol.asyncDispose]());

class Output extends PassThrough {
  text = '';
  constructor() {
    super();
    this.on('data', (chunk: Buffer) => (this.text += chunk.toString()));
  }
}

async function debug(
  lines: readonly string[],
  options: Partial<DebuggerOptions> & { readonly typed?: boolean } = {},
): Promise<{ code: number; text: string }> {
  const output = new Output();
  const input = new PassThrough();
  const base = { runtimePath: runtime, workdir: programs.path('work'), input, output };
  if (options.typed) {
    input.end(`${lines.join('\n')}\n`);
    return { code: await runDebugger({ ...base, ...options }), text: output.text };
  }
  const script = programs.path('script.dbg');
  await writeFile(script, lines.join('\n'));
  return { code: await runDebugger({ ...base, script, ...options }), text: output.text };
}

const SESSION = [
  '# a comment',
  'deploy',
  'start a "b c"',
  'run echo one "two three"',
  'run wait &',
  'ps',
  'kill 2 9',
  'wait',
  'usage',
  'stop',
];

describe('a session', () => {
  test.each([
    ['from a script', false],
    ['typed', true],
  ])(
    '%s deploys, starts, runs, kills and stops, with output and events as they come',
    async (_name, typed) => {
      const { code, text } = await debug(typed ? SESSION.slice(1) : SESSION, { typed });
      expect(code).toBe(0);
      const expected = [
        'deployed, server mode',
        'volume /data is v',
        'start | args: a b c',
        'started',
        'counter probe.words 2',
        'state phase "echo"',
        '1 ! careful',
        '1 | ["one","two three"]',
        'pid 1 ended with code 0',
        'pid 2',
        'pid 2 ended with code 137',
        'probe.words 2',
        'stopped',
      ];
      let at = 0;
      for (const line of expected) {
        const found = text.indexOf(line, at);
        expect(found, `${line} in ${text}`).toBeGreaterThanOrEqual(0);
        at = found + line.length;
      }
    },
  );

  test('with a trace shows each frame decoded and in hex', async () => {
    const { text } = await debug(['deploy', 'start', 'run echo a'], { trace: true, protocol: '9.9.9' });
    expect(text).toContain('--> id=2 hello{version:"9.9.9"}\n    0b 08 02 12 07 0a 05 39 2e 39 2e 39\n');
    expect(text).toContain('<-- id=2 hello{version:"1.2.3"}\n    0b 10 02 22 07 0a 05 31 2e 32 2e 33\n');
    expect(text).toContain('--> id=3 run{bin:"echo",args:["echo","a"]}\n');
    expect(text).toContain('<-- id=3 run{pid:1}\n    06 10 03 52 02 08 01\n');
    expect(text).toContain('<-- event status{pid:1}\n    07 08 01 a2 01 02 08 01\n');
  });

  test('from a script ends with 1 at the first line that fails', async () => {
    const { code, text } = await debug(['deploy', '', 'run too early', 'stop']);
    expect(code).toBe(1);
    expect(text).toContain('error: Activity is deployed - start() command is expected now\nline 3 failed\n');
    expect(text).not.toContain('stopped');
  });

  test('that is typed goes on after a line that fails', async () => {
    const { code, text } = await debug(['fly', 'run "open', 'kill 5', 'deploy', 'quit', 'stop'], {
      typed: true,
    });
    expect(code).toBe(0);
    for (const line of [
      'unknown command "fly"',
      'a " is not closed',
      'no command with pid 5 runs',
      'deployed, server mode',
    ]) {
      expect(text).toContain(line);
    }
    expect(text).not.toContain('stopped');
  });

  test('works with a runtime in command mode', async () => {
    const command = await programs.runtime(
      `mode: 'command', runCommand: (ctx, run) => ctx.command((command) => command.spawn(run.entryPoint, run.args))`,
    );
    const { code, text } = await debug(['deploy', 'start', 'sh echo hello; exit 0'], {
      runtimePath: command,
    });
    expect(code).toBe(0);
    expect(text).toContain('deployed, command mode');
    expect(text).toContain('| hello\n');
  });

  test('copies files into volumes and out of them', async () => {
    const [file, copy] = [programs.path('file'), programs.path('copy')];
    await writeFile(file, 'content');
    const { code } = await debug(['deploy', `put ${file} /data/a/b`, `get /data/a/b ${copy}`]);
    expect(code).toBe(0);
    expect(await readFile(copy, 'utf8')).toBe('content');
    const { text } = await debug(['deploy', 'get /data/../file x']);
    expect(text).toContain('line 2 failed');
  });

  test('ends when its signal aborts', async () => {
    const stop = new AbortController();
    const output = new Output();
    const ended = runDebugger({
      runtimePath: runtime,
      workdir: programs.path('work'),
      input: new PassThrough(),
      output,
      signal: stop.signal,
    });
    stop.abort();
    expect(await ended).toBe(0);
  });

  test('ends when its signal aborts, also while it waits for a command', async () => {
    const stop = new AbortController();
    const output = new Output();
    output.on('data', () => {
      if (output.text.includes('state phase "up"')) stop.abort();
    });
    const endless = await programs.runtime(`
      runCommand: (ctx) => ctx.command(async (command) => {
        await command.state('phase', 'up');
        return new Promise((_, fail) => command.signal.addEventListener('abort', () => fail(command.signal.reason)));
      })`);
    const ended = await debug(['deploy', 'start', 'run x', 'run y'], {
      runtimePath: endless,
      output,
      signal: stop.signal,
    });
    expect(ended.code).toBe(1);
    expect(output.text).toContain('pid 0 failed: the supervisor was closed');
    expect(output.text).not.toContain('run y');
  });

  test('keeps no more than 8 MiB that nobody reads, and says what is left out', async () => {
    const flood = await programs.runtime(`
      runCommand: (ctx) => ctx.command(async (command) => {
        const line = Buffer.alloc(65536, 'x\\n');
        for (let index = 0; index < 512; index += 1) await command.stdout(line);
      })`);
    let text = '';
    let read = false;
    const waiting: (() => void)[] = [];
    const output = new Writable({
      write(chunk: Buffer, _encoding, done) {
        text += chunk.toString();
        if (read) done();
        else waiting.push(done);
      },
    });
    const { code } = await debug(['deploy', 'start', 'run x'], { runtimePath: flood, output });
    expect(code).toBe(0);
    expect(output.writableLength).toBeGreaterThan(8 * 1024 * 1024);
    expect(output.writableLength).toBeLessThan(9 * 1024 * 1024);
    read = true;
    for (const done of waiting) done();
    await new Promise((resolve) => output.end(resolve));
    const [, left] = /^… (\d+) bytes are left out here/m.exec(text) ?? [];
    const shown = 2 * (text.split('\n0 | x').length - 1);
    expect(shown + Number(left)).toBe(512 * 65536);
    expect(text.endsWith('\npid 0 ended with code 0\n')).toBe(true);
  });

  test('shows a character that comes in two pieces as one', async () => {
    const halves = await programs.runtime(`
      runCommand: (ctx) => ctx.command(async (command) => {
        await command.stdout(Uint8Array.of(0x61, 0xc3));
        await new Promise((resolve) => setTimeout(resolve, 20));
        await command.stdout(Uint8Array.of(0xa4));
      })`);
    const { text } = await debug(['deploy', 'start', 'run x'], { runtimePath: halves });
    expect(text).toContain('0 | a\n0 | ä\n');
  });

  test('at a terminal keeps its history', async () => {
    const historyFile = programs.path('history', 'lines');
    const output = Object.assign(new Output(), { isTTY: true, columns: 80 });
    const input = new PassThrough();
    const ended = runDebugger({
      runtimePath: runtime,
      workdir: programs.path('work'),
      input,
      output,
      historyFile,
    });
    input.write('help\rps\rquit\r');
    expect(await ended).toBe(0);
    await expect.poll(() => readFile(historyFile, 'utf8').catch(() => '')).toBe('help\nps\nquit\n');
  });
});

describe('a line', () => {
  test.each([
    ['  a  b ', ['a', 'b']],
    [`'a b' "c \\" d" e\\ f`, ['a b', 'c " d', 'e f']],
    [`a'b'"c"`, ['abc']],
    [`'' ""`, ['', '']],
    ['', []],
  ])('%j is the words %j', (line, words) => {
    expect(splitWords(line)).toEqual(words);
  });

  test('with an open quote is refused', () => {
    expect(() => splitWords(`a 'b`)).toThrow('not closed');
  });
});
