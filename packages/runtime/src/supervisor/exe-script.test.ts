import { describe, expect, test } from 'vitest';
import { parseExeScript } from './exe-script.ts';

const capture = (mode: unknown): unknown =>
  parseExeScript([{ run: { entry_point: 'x', capture: { stdout: mode } } }])[0];

describe('a script', () => {
  test('is read with its defaults, also from text', () => {
    const script = [
      { deploy: {} },
      { deploy: { volumes: ['/a'], hostname: 'h', env: { A: 'b' }, net: [{ id: 'n' }], unknown: 1 } },
      { start: {} },
      { run: { entry_point: '/bin/x', args: ['', 'a'] } },
      { transfer: { from: 'container:/in/a', to: 'output:a', format: null } },
      { terminate: {} },
    ];
    const parsed = parseExeScript(script);
    expect(parsed).toEqual([
      { kind: 'deploy', volumes: null, hostname: null, networks: 0 },
      { kind: 'deploy', volumes: { '/a': { host: {} } }, hostname: 'h', networks: 1 },
      { kind: 'start', args: [] },
      {
        kind: 'run',
        entryPoint: '/bin/x',
        args: ['', 'a'],
        capture: { stdout: { keep: 'nothing' }, stderr: { keep: 'nothing' } },
      },
      { kind: 'transfer', from: 'container:/in/a', to: 'output:a' },
      { kind: 'terminate' },
    ]);
    expect(parseExeScript(JSON.stringify(script))).toEqual(parsed);
  });

  test.each([
    [{ stream: {} }, { keep: 'head', bytes: null, stream: true, format: 'str' }],
    [{ stream: { limit: 5, format: 'bin' } }, { keep: 'head', bytes: 5, stream: true, format: 'bin' }],
    [{ atEnd: {} }, { keep: 'head', bytes: null, stream: false, format: 'str' }],
    [{ atEnd: { head: 1, tail: 2 } }, { keep: 'head', bytes: 1, stream: false, format: 'str' }],
    [{ atEnd: { tail: 2, format: 'binary' } }, { keep: 'tail', bytes: 2, format: 'bin' }],
    [{ atEnd: { headTail: 3, format: 'string' } }, { keep: 'headTail', bytes: 3, format: 'str' }],
  ])('captures as %j says', (mode, expected) => {
    expect(capture(mode)).toMatchObject({ capture: { stdout: expected } });
  });

  test.each([
    ['{', 'exe_script is not JSON'],
    [{ deploy: {} }, 'must be an array'],
    [['terminate'], 'command 0: must be an object with one key'],
    [[{ deploy: {}, start: {} }], 'command 0: must be an object with one key'],
    [[{ deploy: null }], 'command 0: deploy must be an object'],
    [[{ start: [] }], 'start must be an object'],
    [[{ terminate: {} }, { fly: {} }], 'command 1: unknown command "fly"'],
    [[{ sign: {} }], 'SGX'],
    [[{ run: { entryPoint: 'x' } }], 'entry_point must be a text, got nothing'],
    [[{ run: { entry_point: 'x', args: [1] } }], 'args must be a text, got 1'],
    [[{ run: { entry_point: 'x', capture: { stdout: 'all' } } }], 'capture.stdout must be'],
    [
      [{ run: { entry_point: 'x', capture: { stderr: { stream: { limit: -1 } } } } }],
      'limit must be a whole number',
    ],
    [
      [{ run: { entry_point: 'x', capture: { stderr: { stream: { format: 'hex' } } } } }],
      'format must be str or bin, got "hex"',
    ],
    [[{ transfer: { from: 'a' } }], 'to must be a text'],
    [[{ transfer: { from: 'a', to: 'b', fileset: '*' } }], 'transfer with fileset is not offered'],
    [[{ deploy: { volumes: 3 } }], 'volumes must be'],
  ])('%j is refused', (script, message) => {
    expect(() => parseExeScript(script)).toThrow(message);
  });

  test('may have as many commands as the limit and no more', () => {
    const script = Array.from({ length: 3 }, () => ({ terminate: {} }));
    expect(parseExeScript(script, 3)).toHaveLength(3);
    expect(() => parseExeScript(script, 2)).toThrow('3 commands, above the limit commands of 2');
  });
});
