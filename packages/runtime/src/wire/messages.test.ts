/** The bytes are those of a session captured between the deployed programs. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { describeRequest, describeResponse, hexLines } from './describe.ts';
import { FrameDecoder } from './frames.ts';
import {
  decodeRequest,
  decodeResponse,
  requestFrame,
  responseFrame,
  type RequestInit,
  type ResponseInit,
} from './messages.ts';

const REQUESTS: readonly (readonly [string, RequestInit, string])[] = [
  [
    '0b 08 02 12 07 0a 05 30 2e 31 2e 30',
    { id: 2n, command: { case: 'hello', value: { version: '0.1.0' } } },
    'id=2 hello{version:"0.1.0"}',
  ],
  [
    '1b 08 03 52 17 0a 09 2f 62 69 6e 2f 65 63 68 6f 12 04 65 63 68 6f 12 01 61 12 01 62',
    { id: 3n, command: { case: 'run', value: { bin: '/bin/echo', args: ['echo', 'a', 'b'] } } },
    'id=3 run{bin:"/bin/echo",args:["echo","a","b"]}',
  ],
  [
    '08 08 04 5a 04 08 01 10 0f',
    { id: 4n, command: { case: 'kill', value: { pid: 1n, signal: 15 } } },
    'id=4 kill{pid:1,signal:15}',
  ],
  ['04 08 0a 62 00', { id: 10n, command: { case: 'shutdown', value: {} } }, 'id=10 shutdown{}'],
  ['02 08 07', { id: 7n }, 'id=7 (no command)'],
];

const RESPONSES: readonly (readonly [string, ResponseInit, string])[] = [
  [
    '26 08 01 a2 01 21 10 01 22 1d 7b 22 65 78 61 6d 70 6c 65 50 72 6f 70 65 72 74 79 22 3a 22 72 75 6e 6e 69 6e 67 22 7d',
    {
      event: true,
      command: {
        case: 'status',
        value: { running: true, stdout: Buffer.from('{"exampleProperty":"running"}') },
      },
    },
    'event status{running:true,stdout:"{\\"exampleProperty\\":\\"running\\"}"}',
  ],
  [
    '0b 10 02 22 07 0a 05 31 2e 32 2e 33',
    { id: 2n, command: { case: 'hello', value: { version: '1.2.3' } } },
    'id=2 hello{version:"1.2.3"}',
  ],
  ['06 10 03 52 02 08 01', { id: 3n, command: { case: 'run', value: { pid: 1n } } }, 'id=3 run{pid:1}'],
  ['04 10 03 52 00', { id: 3n, command: { case: 'run', value: {} } }, 'id=3 run{}'],
  [
    '09 08 01 a2 01 04 08 01 10 01',
    { event: true, command: { case: 'status', value: { pid: 1n, running: true } } },
    'event status{pid:1,running:true}',
  ],
  [
    '1e 08 01 a2 01 19 08 01 10 01 22 13 2f 62 69 6e 2f 65 63 68 6f 20 65 63 68 6f 20 61 20 62 0a',
    {
      event: true,
      command: {
        case: 'status',
        value: { pid: 1n, running: true, stdout: Buffer.from('/bin/echo echo a b\n') },
      },
    },
    'event status{pid:1,running:true,stdout:"/bin/echo echo a b\\n"}',
  ],
  [
    '07 08 01 a2 01 02 08 01',
    { event: true, command: { case: 'status', value: { pid: 1n } } },
    'event status{pid:1}',
  ],
  ['05 08 01 a2 01 00', { event: true, command: { case: 'status', value: {} } }, 'event status{}'],
  [
    '15 10 04 1a 11 08 01 12 0d 4e 6f 74 20 73 75 70 70 6f 72 74 65 64',
    { id: 4n, command: { case: 'error', value: { code: 1, message: 'Not supported' } } },
    'id=4 error{code:1,message:"Not supported"}',
  ],
  ['04 10 0a 62 00', { id: 10n, command: { case: 'shutdown', value: {} } }, 'id=10 shutdown{}'],
  [
    '24 08 01 aa 01 1f 12 1d 0a 12 67 6f 6c 65 6d 2e 75 73 61 67 65 2e 63 75 73 74 6f 6d 11 00 00 00 00 00 00 f8 3f',
    {
      event: true,
      command: {
        case: 'rtStatus',
        value: { kind: { case: 'counter', value: { name: 'golem.usage.custom', value: 1.5 } } },
      },
    },
    'event rtStatus{counter:{name:"golem.usage.custom",value:1.5}}',
  ],
  [
    '17 08 01 aa 01 12 0a 10 0a 05 70 68 61 73 65 12 07 7b 22 61 22 3a 31 7d',
    {
      event: true,
      command: {
        case: 'rtStatus',
        value: { kind: { case: 'state', value: { name: 'phase', value: Buffer.from('{"a":1}') } } },
      },
    },
    'event rtStatus{state:{name:"phase",value:"{\\"a\\":1}"}}',
  ],
];

const hex = (text: string): Buffer => Buffer.from(text.replaceAll(' ', ''), 'hex');

function payloadOf(frame: string): Uint8Array {
  const payloads: Uint8Array[] = [];
  new FrameDecoder().push(hex(frame), (payload) => payloads.push(payload));
  expect(payloads).toHaveLength(1);
  return payloads[0]!;
}

describe('captured frames', () => {
  test.each(REQUESTS)('request %s is encoded and decoded to the byte', (bytes, request, line) => {
    expect(Buffer.from(requestFrame(request))).toEqual(hex(bytes));
    const decoded = decodeRequest(payloadOf(bytes));
    expect(describeRequest(decoded)).toBe(line);
    expect(Buffer.from(requestFrame(decoded))).toEqual(hex(bytes));
  });

  test.each(RESPONSES)('response %s is encoded and decoded to the byte', (bytes, response, line) => {
    expect(Buffer.from(responseFrame(response))).toEqual(hex(bytes));
    const decoded = decodeResponse(payloadOf(bytes));
    expect(describeResponse(decoded)).toBe(line);
    expect(Buffer.from(responseFrame(decoded))).toEqual(hex(bytes));
  });
});

describe('the rules of the encoding', () => {
  test('an empty argument is kept', () => {
    const frame = requestFrame({ id: 1n, command: { case: 'run', value: { args: ['', 'x'] } } });
    expect(Buffer.from(frame).toString('hex')).toContain('1200120178');
  });

  test('a negative return code is a varint of ten bytes', () => {
    const frame = responseFrame({ event: true, command: { case: 'status', value: { returnCode: -1 } } });
    expect(Buffer.from(frame).toString('hex')).toContain('18ffffffffffffffffff01');
    const { command } = decodeResponse(frame.subarray(1));
    expect(command.case === 'status' && command.value.returnCode).toBe(-1);
  });

  test('ids and pids keep all 64 bits', () => {
    const id = 2n ** 64n - 1n;
    const frame = responseFrame({ id, command: { case: 'run', value: { pid: id } } });
    const decoded = decodeResponse(frame.subarray(1));
    expect(decoded.id).toBe(id);
    expect(decoded.command.case === 'run' && decoded.command.value.pid).toBe(id);
  });

  test('the last member of a oneof wins and unknown fields are skipped', () => {
    // hello, then shutdown, then an unknown field 99.
    const decoded = decodeRequest(hex('08 02 12 00 62 00 9a 06 01 78'));
    expect(decoded.command.case).toBe('shutdown');
  });

  test('an error code beyond the three known ones is kept', () => {
    const frame = responseFrame({ id: 1n, command: { case: 'error', value: { code: 13, message: 'm' } } });
    const { command } = decodeResponse(frame.subarray(1));
    expect(command.case === 'error' && command.value.code).toBe(13);
  });

  test('garbage either decodes or is refused by name', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 60 }), (bytes) => {
        try {
          decodeRequest(bytes);
          decodeResponse(bytes);
        } catch (error) {
          expect((error as Error).message).toMatch(/are not a (request|response)/);
        }
      }),
      { numRuns: 500 },
    );
    expect(() => decodeResponse(Buffer.from('hello, world\n'))).toThrow(
      '13 bytes (68656c6c6f2c20776f726c640a, in text "hello, world\\n") are not a response',
    );
    expect(() => decodeResponse(hex('ff ff ff ff ff'))).toThrow('5 bytes (ffffffffff) are not a response');
  });
});

test('hex is shown sixteen bytes to a line', () => {
  expect(hexLines(new Uint8Array(17), '  ')).toBe(`  ${'00 '.repeat(15)}00\n  00`);
});
