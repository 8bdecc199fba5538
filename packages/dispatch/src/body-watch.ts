/**
 * Ends requests whose body does not come: after `silenceMs` without a byte, and JSON bodies after four times that
 * whatever drips in. Node's own `requestTimeout` bounds the whole request and would end every long upload; a
 * timer on the socket would fire in long polls, which are silent by design.
 */
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Clock, Timer } from '@millrace/runner';

const SLOWEST_JSON = 4;

interface Watched {
  readonly response: ServerResponse;
  readonly json: boolean;
  readonly since: number;
  bytes: number;
  lastByteAt: number;
}

export class BodyWatch implements Disposable {
  readonly #clock: Clock;
  readonly #silenceMs: number;
  readonly #bodies = new Map<IncomingMessage, Watched>();
  #timer: Timer | null = null;

  constructor(clock: Clock, silenceMs: number) {
    this.#clock = clock;
    this.#silenceMs = silenceMs;
  }

  watch(request: IncomingMessage, response: ServerResponse): void {
    const { headers } = request;
    if (headers['transfer-encoding'] === undefined && (headers['content-length'] ?? '0') === '0') return;
    const now = this.#clock.monotonic();
    this.#bodies.set(request, {
      response,
      json: headers['content-type']?.startsWith('application/json') ?? false,
      since: now,
      bytes: request.socket.bytesRead,
      lastByteAt: now,
    });
    const forget = (): void => void this.#bodies.delete(request);
    request.once('end', forget);
    request.once('close', forget);
    this.#arm();
  }

  [Symbol.dispose](): void {
    this.#timer?.cancel();
    this.#bodies.clear();
  }

  #arm(): void {
    this.#timer ??= this.#clock.setTimer(
      () => {
        this.#timer = null;
        this.#look();
        if (this.#bodies.size > 0) this.#arm();
      },
      Math.max(10, this.#silenceMs / 4),
      { unref: true },
    );
  }

  #look(): void {
    const now = this.#clock.monotonic();
    for (const [request, body] of this.#bodies) {
      const bytes = request.socket.bytesRead;
      if (bytes !== body.bytes || request.readableLength > 0) {
        // Bytes that wait to be read are held back by us, for whoever stores them: not the client's silence.
        body.bytes = bytes;
        body.lastByteAt = now;
      }
      const silent = now - body.lastByteAt >= this.#silenceMs;
      const dripping = body.json && now - body.since >= SLOWEST_JSON * this.#silenceMs;
      if (silent || dripping) {
        this.#bodies.delete(request);
        end(request, body.response, `the body did not come in time (limit slowClientMs, ${this.#silenceMs})`);
      }
    }
  }
}

/** Written past the framework, which waits for the body: what comes of that wait no longer reaches anybody. */
function end(request: IncomingMessage, response: ServerResponse, message: string): void {
  if (!response.headersSent) {
    const body = JSON.stringify({ error: { code: 'deadline_exceeded', message } });
    request.socket.write(
      'HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json; charset=utf-8\r\n' +
        `Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
    );
  }
  request.socket.destroySoon();
}
