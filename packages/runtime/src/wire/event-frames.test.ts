import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { counterFrame, statusFrame } from './event-frames.ts';
import { responseFrame } from './messages.ts';

describe('event frames', () => {
  test('of a process are the bytes of the general encoder', () => {
    const pid = fc.oneof(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), fc.bigInt({ min: 0n, max: 300n }));
    const output = fc.uint8Array({ maxLength: 300 });
    fc.assert(
      fc.property(
        pid,
        fc.boolean(),
        fc.oneof(fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }), fc.integer({ min: -2, max: 200 })),
        output,
        output,
        (pid, running, returnCode, stdout, stderr) => {
          const status = { pid, running, returnCode, stdout, stderr };
          expect(Buffer.from(statusFrame(status))).toEqual(
            Buffer.from(responseFrame({ event: true, command: { case: 'status', value: status } })),
          );
        },
      ),
      { numRuns: 500 },
    );
  });

  test('of a counter are the bytes of the general encoder', () => {
    fc.assert(
      fc.property(fc.string({ maxLength: 200, unit: 'grapheme' }), fc.double(), (name, value) => {
        const kind = { case: 'counter', value: { name, value } } as const;
        expect(Buffer.from(counterFrame(name, value))).toEqual(
          Buffer.from(responseFrame({ event: true, command: { case: 'rtStatus', value: { kind } } })),
        );
      }),
      { numRuns: 500 },
    );
  });
});
