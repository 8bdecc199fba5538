import { describe, expect, test } from 'vitest';
import { GuestLog } from './guest-log.ts';

function open(maxBytes: number): { log: GuestLog; sent: string[]; time: { ms: number } } {
  const sent: string[] = [];
  const time = { ms: 0 };
  const log = new GuestLog(
    (bytes) => sent.push(Buffer.from(bytes).toString()),
    () => time.ms,
  );
  log.begin(maxBytes);
  return { log, sent, time };
}

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);

describe('diagnostics', () => {
  test('are sent as they are written', () => {
    const { log, sent } = open(100);
    log.write(bytes('a'));
    log.write(bytes(''));
    log.write(bytes('b'));
    expect(sent).toEqual(['a', 'b']);
  });

  test('end exactly at the limit, and what comes after is counted', () => {
    const { log, sent } = open(5);
    log.write(bytes('abc'));
    log.write(bytes('de'));
    expect(log.droppedBytes).toBe(0);
    log.write(bytes('fgh'));
    log.flush();
    expect(sent.join('')).toBe('abcde');
    expect([log.bytes, log.droppedBytes]).toEqual([8, 3]);
  });

  test('that come in a flood are sent in batches, all of them', () => {
    const { log, sent, time } = open(1_000_000);
    for (let index = 0; index < 10_000; index += 1) log.write(bytes('0123456789'));
    expect(sent.length).toBeLessThan(64 + 100_000 / 16_384 + 1);
    time.ms = 10;
    log.write(bytes('!'));
    expect(sent.at(-1)).toMatch(/!$/);
    expect(sent.join('')).toBe('0123456789'.repeat(10_000) + '!');
  });

  test('are told again when they are short, and by both ends when they are long', () => {
    const { log } = open(0);
    log.write(bytes('a'.repeat(300)));
    log.write(bytes('b'.repeat(212)));
    expect(log.excerpt()).toBe('a'.repeat(300) + 'b'.repeat(212));
    log.write(bytes('c'));
    expect(log.excerpt()).toBe(`${'a'.repeat(256)} […1 bytes…] ${'a'.repeat(43)}${'b'.repeat(212)}c`);
    log.write(bytes('d'.repeat(5_000)));
    expect(log.excerpt()).toBe(`${'a'.repeat(256)} […5001 bytes…] ${'d'.repeat(256)}`);
  });

  test('of one call do not show in the next', () => {
    const { log } = open(10);
    log.write(bytes('secret of the first'));
    log.begin(10);
    expect([log.bytes, log.excerpt()]).toEqual([0, '']);
    log.write(bytes('x'));
    expect(log.excerpt()).toBe('x');
  });
});
