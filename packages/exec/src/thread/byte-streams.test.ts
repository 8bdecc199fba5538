import { setImmediate as nextTurn } from 'node:timers/promises';
import { MessageChannel } from 'node:worker_threads';
import { afterEach, describe, expect, test } from 'vitest';
import { ByteStreams, MAX_PIECE_BYTES, WINDOW_BYTES } from './byte-streams.ts';
import type { StreamMessage } from './byte-streams.ts';

const closers: (() => void)[] = [];
afterEach(() => {
  for (const close of closers.splice(0)) close();
});

/** Two ends over real ports, and every message that went each way. */
function pair(): { sender: ByteStreams; receiver: ByteStreams; messages: StreamMessage[] } {
  const { port1, port2 } = new MessageChannel();
  const messages: StreamMessage[] = [];
  const end = (port: typeof port1): ByteStreams =>
    new ByteStreams((message, transfer = []) => port.postMessage(message, transfer));
  const sender = end(port1);
  const receiver = end(port2);
  port1.on('message', (message: StreamMessage) => {
    messages.push(message);
    sender.handle(message);
  });
  port2.on('message', (message: StreamMessage) => {
    messages.push(message);
    receiver.handle(message);
  });
  closers.push(() => port1.close());
  return { sender, receiver, messages };
}

/** Long enough for everything that will happen without further help. */
async function quiet(): Promise<void> {
  for (let turn = 0; turn < 50; turn += 1) await nextTurn();
}

describe('a byte stream over a port', () => {
  test('arrives whole and in order, with chunks of any size', async () => {
    const { sender, receiver } = pair();
    const chunks = [1, 0, 70_000, MAX_PIECE_BYTES, MAX_PIECE_BYTES + 1, 3 * WINDOW_BYTES].map((size, i) =>
      Buffer.alloc(size, i + 1),
    );
    const stream = receiver.receive(1);
    const sent = sender.send(
      1,
      (async function* () {
        yield* chunks;
      })(),
    );
    const received: Buffer[] = [];
    for await (const chunk of stream) received.push(chunk as Buffer);
    await sent;
    expect(Buffer.concat(received).equals(Buffer.concat(chunks))).toBe(true);
  });

  test('the sender waits when nobody reads, and goes on when somebody does', async () => {
    const { sender, receiver } = pair();
    const size = MAX_PIECE_BYTES;
    let produced = 0;
    const total = 4 * WINDOW_BYTES;
    const stream = receiver.receive(7);
    const sent = sender.send(
      7,
      (async function* () {
        for (; produced < total; produced += size) yield Buffer.alloc(size);
      })(),
    );
    await quiet();
    expect(produced).toBe(WINDOW_BYTES);
    let read = 0;
    for await (const chunk of stream) {
      read += (chunk as Buffer).length;
      await nextTurn();
      // Under way, in the reader's own buffer, and the chunk in hand.
      expect(produced - read).toBeLessThanOrEqual(WINDOW_BYTES + 2 * size);
    }
    await sent;
    expect(read).toBe(total);
  });

  test('the memory it was given stays usable', async () => {
    const { sender, receiver } = pair();
    const scratch = Buffer.alloc(1000);
    const stream = receiver.receive(1);
    void sender.send(
      1,
      (async function* () {
        for (const value of [1, 2, 3]) yield scratch.fill(value);
      })(),
    );
    const received: number[] = [];
    for await (const chunk of stream) received.push((chunk as Buffer)[999]!);
    expect(received).toEqual([1, 2, 3]);
    expect(scratch.length).toBe(1000);
  });

  test('a reader that stops early closes the source', async () => {
    const { sender, receiver } = pair();
    let closed = false;
    const stream = receiver.receive(1);
    const sent = sender.send(
      1,
      (async function* () {
        try {
          for (;;) yield Buffer.alloc(1000);
        } finally {
          closed = true;
        }
      })(),
    );
    for await (const chunk of stream) {
      expect(chunk).toHaveLength(1000);
      break;
    }
    await sent;
    expect(closed).toBe(true);
  });

  test('what the source throws reaches both sides', async () => {
    const { sender, receiver } = pair();
    const stream = receiver.receive(1);
    const failure = expect(
      sender.send(
        1,
        (async function* () {
          yield Buffer.alloc(10);
          throw new TypeError('source broke');
        })(),
      ),
    ).rejects.toThrow('source broke');
    const reading = (async () => {
      for await (const chunk of stream) expect(chunk).toHaveLength(10);
    })();
    await expect(reading).rejects.toMatchObject({ name: 'TypeError', message: 'source broke' });
    await failure;
  });

  test('chunks that are not bytes are refused', async () => {
    const { sender, receiver } = pair();
    const stream = receiver.receive(1);
    const text = (async function* () {
      yield 'text' as unknown as Uint8Array;
    })();
    await expect(sender.send(1, text)).rejects.toMatchObject({ code: 'invalid_argument' });
    await expect(stream.toArray()).rejects.toMatchObject({ code: 'invalid_argument' });
  });

  test('closing fails what is received and ends what is sent', async () => {
    const { sender, receiver, messages } = pair();
    const stream = receiver.receive(1);
    let closed = false;
    const sent = sender.send(
      1,
      (async function* () {
        try {
          for (;;) yield Buffer.alloc(MAX_PIECE_BYTES);
        } finally {
          closed = true;
        }
      })(),
    );
    await quiet();
    receiver.close(new Error('over'));
    await expect(stream.toArray()).rejects.toThrow('over');
    sender.close(new Error('over'));
    await sent;
    expect(closed).toBe(true);
    const before = messages.length;
    await quiet();
    expect(messages).toHaveLength(before);
  });
});
