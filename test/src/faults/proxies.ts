/** What stands between real processes so that their messages can be lost: proxies for HTTP and for plain connections. */
import { once } from 'node:events';
import {
  createServer as createHttpServer,
  request as send,
  type IncomingMessage,
  type Server as HttpServer,
  type ServerResponse,
} from 'node:http';
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net';
import { setTimeout as pause } from 'node:timers/promises';
import type { Random } from '@millrace/runner';

/** Connections through it can be cut, all at once, and kept from being made again. */
export class TcpProxy implements AsyncDisposable {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  #cut = false;

  private constructor(server: Server, port: number) {
    this.#server = server;
    server.on('connection', (near: Socket) => {
      if (this.#cut) {
        near.destroy();
        return;
      }
      const far = connect(port, '127.0.0.1');
      for (const [one, other] of [
        [near, far],
        [far, near],
      ] as const) {
        this.#sockets.add(one);
        one.on('error', () => undefined);
        one.on('close', () => {
          this.#sockets.delete(one);
          other.destroy();
        });
      }
      near.pipe(far).pipe(near);
    });
  }

  /** To a port of the loopback. */
  static async open(port: number): Promise<TcpProxy> {
    const server = createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    return new TcpProxy(server, port);
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** Returns how many connections it were. */
  cut(): number {
    this.#cut = true;
    const count = this.#sockets.size / 2;
    for (const socket of this.#sockets) socket.destroy();
    return count;
  }

  heal(): void {
    this.#cut = false;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.cut();
    this.#server.close();
    await once(this.#server, 'close');
  }
}

/** Of one message, a request or an answer. The three do not exclude each other. */
export interface Weather {
  readonly random: Random;
  /** Chance that it is lost; its sender's connection breaks. */
  readonly loss: number;
  /** Chance that a request arrives twice. */
  readonly repeat: number;
  /** Chance that it comes later, by up to `delayMs`. */
  readonly delay: number;
  readonly delayMs: number;
}

/** What a request is, to choose one. */
export interface Requested {
  readonly method: string;
  readonly path: string;
}

interface Trap {
  readonly matches: (request: Requested) => boolean;
  readonly sprung: (request: Requested) => Promise<void>;
}

/** HTTP/1.1 to an origin that may move. */
export class HttpProxy implements AsyncDisposable {
  /** Where requests go; null: nowhere, and connections break. */
  target: string | null = null;
  weather: Weather | null = null;
  /** Added to the `Date` of every answer: a process cannot set the clock that its HTTP server tells. */
  dateOffsetMs = 0;
  /** What became of messages. */
  readonly counts = { passed: 0, lost: 0, doubled: 0, delayed: 0 };
  readonly #server: HttpServer;
  readonly #sockets = new Set<Socket>();
  #cut = false;
  #trap: Trap | null = null;

  private constructor(server: HttpServer) {
    this.#server = server;
    server.on('connection', (socket: Socket) => {
      if (this.#cut) {
        socket.destroy();
        return;
      }
      this.#sockets.add(socket);
      socket.on('error', () => undefined);
      socket.on('close', () => this.#sockets.delete(socket));
    });
    server.on('request', (request: IncomingMessage, response: ServerResponse) => {
      // Whatever goes wrong is a connection that breaks.
      this.#serve(request, response).catch(() => response.destroy());
    });
  }

  static async open(): Promise<HttpProxy> {
    const server = createHttpServer({ requestTimeout: 0 }).listen(0, '127.0.0.1');
    await once(server, 'listening');
    return new HttpProxy(server);
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Breaks all connections, and those to come. Returns how many it were. */
  cut(): number {
    this.#cut = true;
    const count = this.#sockets.size;
    for (const socket of this.#sockets) socket.destroy();
    return count;
  }

  heal(): void {
    this.#cut = false;
  }

  /**
   * The next request that matches is answered by its target, which has then committed it; but before anything of the answer
   * is passed on, `act` runs, and the connection breaks. Resolves when that is done.
   */
  async betweenCommitAndAnswer(
    matches: (request: Requested) => boolean,
    act: (request: Requested) => Promise<void>,
  ): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      this.#trap = {
        matches,
        sprung: async (request) => {
          await act(request).then(resolve, reject);
        },
      };
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.cut();
    this.#server.close();
    await once(this.#server, 'close');
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    const body = Buffer.concat(chunks);
    if (await this.#mishap()) {
      response.destroy();
      return;
    }
    if (this.weather !== null && this.weather.random() < this.weather.repeat) void this.#again(request, body);
    const gone = new AbortController();
    response.on('close', () => gone.abort());
    const answer = await this.#forward(request, body, gone.signal);
    const requested = { method: request.method ?? '', path: request.url ?? '' };
    const trap = this.#trap;
    if (trap?.matches(requested) === true && (answer.statusCode ?? 500) < 300) {
      this.#trap = null;
      for await (const _ of answer) continue;
      await trap.sprung(requested);
      response.destroy();
      return;
    }
    if (await this.#mishap()) {
      answer.destroy();
      response.destroy();
      return;
    }
    this.counts.passed += 1;
    response.writeHead(
      answer.statusCode ?? 500,
      answer.rawHeaders.map((text, index, all) =>
        index % 2 === 1 && all[index - 1]!.toLowerCase() === 'date'
          ? new Date(Date.parse(text) + this.dateOffsetMs).toUTCString()
          : text,
      ),
    );
    response.flushHeaders();
    answer.on('error', () => response.destroy());
    answer.on('aborted', () => response.destroy());
    answer.pipe(response);
  }

  /** The request once more, a little later. Its answer interests nobody. */
  async #again(request: IncomingMessage, body: Buffer): Promise<void> {
    this.counts.doubled += 1;
    await pause((this.weather?.random() ?? 0) * (this.weather?.delayMs ?? 0));
    await this.#forward(request, body).then(
      (answer) => answer.resume(),
      () => undefined,
    );
  }

  /** What the weather does to one message; true: it is lost. */
  async #mishap(): Promise<boolean> {
    const { weather } = this;
    if (weather === null) return false;
    if (weather.random() < weather.delay) {
      this.counts.delayed += 1;
      await pause(weather.random() * weather.delayMs);
    }
    if (weather.random() >= weather.loss) return false;
    this.counts.lost += 1;
    return true;
  }

  async #forward(request: IncomingMessage, body: Buffer, signal?: AbortSignal): Promise<IncomingMessage> {
    if (this.target === null) throw new Error('the dispatcher is down');
    const { hostname, port } = new URL(this.target);
    // The body was read whole.
    const { 'transfer-encoding': _, ...headers } = request.headers;
    const forwarded = send({
      hostname,
      port,
      method: request.method,
      path: request.url,
      headers: { ...headers, 'content-length': body.length },
      agent: false,
      ...(signal !== undefined && { signal }),
    });
    const answered = once(forwarded, 'response') as Promise<[IncomingMessage]>;
    // Once there is an answer, the answer tells of it.
    forwarded.on('error', () => undefined);
    forwarded.end(body);
    const [answer] = await answered;
    return answer;
  }
}
