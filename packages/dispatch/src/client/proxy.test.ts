import { createServer, request as httpRequest, type IncomingMessage, type Server } from 'node:http';
import { connect, type AddressInfo } from 'node:net';
import { afterEach, describe, expect, test } from 'vitest';
import { HttpOrigin } from './http.ts';
import { proxyFor } from './proxy.ts';

const SETTINGS = { http: 'http://plain:3128', https: 'http://secure:3128', no: '' };

describe('proxyFor', () => {
  test('each kind of origin has its own, and without settings there is none', () => {
    expect(proxyFor(new URL('http://a.test'), SETTINGS)).toBe('http://plain:3128');
    expect(proxyFor(new URL('https://a.test'), SETTINGS)).toBe('http://secure:3128');
    expect(proxyFor(new URL('https://a.test'), { ...SETTINGS, https: null })).toBeNull();
    expect(proxyFor(new URL('http://a.test'), undefined)).toBeNull();
  });

  test.each([
    ['*', 'http://a.test', true],
    ['a.test', 'http://a.test:8080', true],
    ['a.test', 'http://A.Test', true],
    ['a.test', 'http://b.a.test', true],
    ['.a.test', 'http://a.test', true],
    ['.a.test', 'http://b.a.test', true],
    ['a.test', 'http://ba.test', false],
    ['b.test, a.test', 'http://a.test', true],
    ['b.test a.test', 'http://a.test', true],
    ['127.0.0.1', 'http://127.0.0.1:7070', true],
    ['127.0.0.1', 'http://127.0.0.2', false],
    ['10.0.0.0/8', 'http://10.255.0.1', true],
    ['10.0.0.0/8', 'http://11.0.0.1', false],
    ['0.0.0.0/0', 'http://11.0.0.1', true],
    ['10.0.0.0/33', 'http://10.0.0.0', false],
    ['10.0.0.0/x', 'http://10.0.0.0', false],
    ['::1', 'http://[::1]:7070', true],
    ['[::1]', 'http://[::1]:7070', true],
    ['fd00::/8', 'http://[fd12::1]', true],
    ['fd00::/8', 'http://10.0.0.1', false],
    ['10.0.0.0/8', 'http://10.test', false],
    ['', 'http://a.test', false],
  ])('NO_PROXY=%s covers %s: %s', (no, url, covered) => {
    expect(proxyFor(new URL(url), { ...SETTINGS, no })).toBe(covered ? null : 'http://plain:3128');
  });
});

describe('requests through a proxy', () => {
  let servers: Server[] = [];
  afterEach(async () => {
    for (const server of servers) {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    }
    servers = [];
  });

  async function listen(
    handler: Parameters<typeof createServer>[1],
  ): Promise<{ server: Server; url: string }> {
    const server = createServer(handler as never);
    servers.push(server);
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    return { server, url: `http://127.0.0.1:${(server.address() as AddressInfo).port}` };
  }

  /** Passes on what it is sent, and writes down whom it was for. */
  async function proxy() {
    const seen: string[] = [];
    const authorized: (string | undefined)[] = [];
    const pass = (request: IncomingMessage): URL => {
      authorized.push(request.headers['proxy-authorization']);
      return new URL(request.url ?? '');
    };
    const { server, url } = await listen(((request, response) => {
      const target = pass(request);
      seen.push(`${request.method} ${target.href}`);
      const onward = httpRequest(target, { method: request.method, headers: request.headers }, (answer) => {
        response.writeHead(answer.statusCode ?? 0, answer.headers);
        answer.pipe(response);
      });
      request.pipe(onward);
    }) satisfies Parameters<typeof createServer>[1]);
    server.on('connect', (request, socket) => {
      seen.push(`CONNECT ${request.url}`);
      const [host = '', port] = (request.url ?? '').split(':');
      const onward = connect(Number(port), host, () => {
        socket.write('HTTP/1.1 200 OK\r\n\r\n');
        onward.pipe(socket).pipe(onward);
      });
      onward.on('error', () => socket.destroy());
      socket.on('error', () => onward.destroy());
    });
    return { url, seen, authorized };
  }

  test('plain ones are sent to it with their whole address, and its password with them', async () => {
    const origin = await listen((request, response) => void response.end(`${request.method} ${request.url}`));
    const via = await proxy();
    await using http = new HttpOrigin({
      baseUrl: `${origin.url}/v1`,
      proxy: { http: via.url.replace('//', '//user:pass@'), https: null, no: '' },
    });
    const response = await http.request({ method: 'POST', path: '/tasks?a=b', json: { x: 1 } });
    expect([response.status, await response.text()]).toEqual([200, 'POST /v1/tasks?a=b']);
    expect(via.seen).toEqual([`POST ${origin.url}/v1/tasks?a=b`]);
    expect(via.authorized).toEqual([`Basic ${Buffer.from('user:pass').toString('base64')}`]);
  });

  test('https goes through a tunnel, so that the proxy sees nothing of it', async () => {
    const via = await proxy();
    const origin = await listen((_request, response) => void response.end());
    await using http = new HttpOrigin({
      baseUrl: origin.url.replace('http:', 'https:'),
      proxy: { http: null, https: via.url, no: '' },
    });
    // The origin speaks no TLS; that the tunnel was asked for is what counts.
    await expect(http.request({ method: 'GET', path: '/secret' })).rejects.toMatchObject({
      code: 'unavailable',
    });
    expect(via.seen).toEqual([`CONNECT ${new URL(origin.url).host}`]);
  });

  test('what NO_PROXY covers goes straight', async () => {
    const origin = await listen((_request, response) => void response.end('direct'));
    const via = await proxy();
    await using http = new HttpOrigin({
      baseUrl: origin.url,
      proxy: { http: via.url, https: via.url, no: '127.0.0.0/8' },
    });
    expect(await (await http.request({ method: 'GET', path: '/' })).text()).toBe('direct');
    expect(via.seen).toEqual([]);
  });

  test('a proxy that is not there is a network error that names no password', async () => {
    await using http = new HttpOrigin({
      baseUrl: 'http://a.test',
      proxy: { http: 'http://user:sesame@127.0.0.1:9', https: null, no: '' },
    });
    const error = await http.request({ method: 'GET', path: '/' }).then(
      () => null,
      (thrown: unknown) => thrown,
    );
    expect(error).toMatchObject({ code: 'unavailable', retryable: true });
    expect((error as Error).message).not.toContain('sesame');
  });
});
