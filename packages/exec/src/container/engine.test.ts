/** The engine's client against servers that answer badly, late, or no more. A real engine is in container.test.ts. */
import { createServer } from 'node:http';
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer as createSocketServer } from 'node:net';
import type { AddressInfo, Server as SocketServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { ContainerEngine } from './engine.ts';
import { proveRemoved } from './removal.ts';

const closing: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

const VERSION = { ApiVersion: '1.41', MinAPIVersion: '1.24', Version: '4.3.1' };

type Route = (request: IncomingMessage, response: ServerResponse) => void;

/** An engine that speaks version 1.41, and beyond that what `route` says. */
async function engineSaying(route: Route, callMs = 5_000): Promise<ContainerEngine> {
  const server = createServer((request, response) => {
    if (request.url === '/version') answer(response, 200, VERSION);
    else route(request, response);
  });
  const host = await listening(server);
  const engine = new ContainerEngine({ host, callMs });
  closing.push(() => engine.close());
  return engine;
}

async function listening(server: Server | SocketServer): Promise<string> {
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  closing.push(() => {
    if ('closeAllConnections' in server) server.closeAllConnections();
    server.close();
  });
  return `tcp://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

function answer(response: ServerResponse, status: number, body: unknown): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));
}

test('an engine too old or too new is refused with the versions that will do', async () => {
  for (const [ApiVersion, MinAPIVersion] of [
    ['1.39', '1.12'],
    ['2.0', '2.0'],
  ]) {
    const host = await listening(
      createServer((_, response) => answer(response, 200, { ApiVersion, MinAPIVersion })),
    );
    await using engine = new ContainerEngine({ host });
    await expect(engine.version()).rejects.toMatchObject({
      code: 'unimplemented',
      message: expect.stringContaining('this node needs one of 1.40 to 1.51') as string,
    });
  }
});

test('the newest API version both sides know is spoken', async () => {
  const asked: (string | undefined)[] = [];
  for (const [ApiVersion, MinAPIVersion] of [
    ['1.40', '1.12'],
    ['1.99', '1.44'],
  ]) {
    const server = createServer((request, response) => {
      asked.push(request.url);
      answer(response, 200, request.url === '/version' ? { ApiVersion, MinAPIVersion } : []);
    });
    await using engine = new ContainerEngine({ host: await listening(server) });
    await engine.listContainers({});
  }
  expect(asked.filter((url) => url !== '/version').map((url) => url?.split('/')[1])).toEqual([
    'v1.40',
    'v1.51',
  ]);
});

test('an engine that never answers costs each call its time, and no more', async () => {
  const engine = await engineSaying(() => undefined, 100);
  await expect(engine.inspectContainer('x')).rejects.toMatchObject({
    code: 'deadline_exceeded',
    message: expect.stringMatching(/did not look at container x within 100 ms/) as string,
  });
  await expect(engine.startContainer('x', { timeoutMs: 50 })).rejects.toMatchObject({
    message: expect.stringContaining('50 ms') as string,
  });
});

test('an engine that stops in the middle of an answer costs the call its time', async () => {
  const engine = await engineSaying((_, response) => {
    response.writeHead(200, { 'content-type': 'application/json' });
    response.write('{"Id":');
  }, 100);
  await expect(engine.inspectContainer('x')).rejects.toMatchObject({ code: 'deadline_exceeded' });
});

test('a call ends with the reason of its signal, before and while it waits', async () => {
  const reason = new Error('enough');
  const controller = new AbortController();
  const engine = await engineSaying(() => controller.abort(reason));
  await expect(engine.waitContainer('x', { signal: controller.signal })).rejects.toBe(reason);
  await expect(engine.waitContainer('x', { signal: controller.signal })).rejects.toBe(reason);
});

test('an engine that closes the connection, or dies with a container waited for, is unavailable', async () => {
  const engine = await engineSaying((request) => request.socket.destroy());
  await expect(engine.waitContainer('x')).rejects.toMatchObject({
    code: 'unavailable',
    retryable: true,
    message: expect.stringContaining('went away while asked to wait for container x') as string,
  });
});

test('closing ends the calls under way as unavailable', async () => {
  const engine = await engineSaying(() => void engine.close());
  await expect(engine.waitContainer('x')).rejects.toMatchObject({ code: 'unavailable' });
});

test('what is no container engine is told so, whatever it says', async () => {
  const html = await listening(createServer((_, response) => response.end('<html>It works!</html>')));
  await using web = new ContainerEngine({ host: html });
  await expect(web.version()).rejects.toMatchObject({
    code: 'unavailable',
    message: expect.stringContaining('<html>') as string,
  });

  const garbage = createSocketServer((socket) => socket.end('SSH-2.0-OpenSSH\r\n'));
  await using ssh = new ContainerEngine({ host: await listening(garbage) });
  await expect(ssh.version()).rejects.toMatchObject({ code: 'unavailable' });
});

test('an endless answer is refused, not collected', async () => {
  const engine = await engineSaying((_, response) => {
    response.writeHead(200);
    const chunk = Buffer.alloc(1024 * 1024, 0x20);
    const more = (): void => {
      while (!response.destroyed && response.write(chunk));
      response.once('drain', more);
    };
    more();
  });
  await expect(engine.inspectContainer('x')).rejects.toMatchObject({ code: 'resource_exhausted' });
});

test.each([
  [400, 'invalid_argument'],
  [403, 'permission_denied'],
  [404, 'not_found'],
  [409, 'failed_precondition'],
  [500, 'failed_precondition'],
  [503, 'unavailable'],
])("status %i is %s, in the engine's own words", async (status, code) => {
  const engine = await engineSaying((_, response) => answer(response, status, { message: 'no, because' }));
  await expect(engine.startContainer('x')).rejects.toMatchObject({
    code,
    message: expect.stringMatching(/could not start container x: no, because$/) as string,
    details: { status },
  });
});

test('a pull that fails after its answer began is an error', async () => {
  const engine = await engineSaying((request, response) => {
    expect(request.url).toBe('/v1.41/images/create?fromImage=debian&tag=latest');
    response.writeHead(200);
    response.end('{"status":"Pulling"}\n{"error":"manifest unknown"}\n');
  });
  await expect(engine.pullImage('debian')).rejects.toMatchObject({
    code: 'failed_precondition',
    message: expect.stringMatching(/could not pull image debian: manifest unknown/) as string,
  });
});

test('a socket file that is not there, and one nobody listens on, are unavailable and say what to do', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'millrace-engine-'));
  closing.push(() => rm(folder, { recursive: true }));
  const server = createServer().listen(join(folder, 'there.sock'));
  await once(server, 'listening');
  server.close();
  for (const name of ['none.sock', 'there.sock']) {
    await using engine = new ContainerEngine({ host: join(folder, name) });
    await expect(engine.ping()).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(
        /^no container engine answers at unix:.*start Docker or Podman there/,
      ) as string,
    });
  }
});

test('removal is asked for until the engine knows no such container, and given up in the end', async () => {
  let looked = 0;
  const asked: string[] = [];
  const slow = await engineSaying((request, response) => {
    asked.push(`${request.method}`);
    if (request.method !== 'GET')
      answer(response, request.method === 'POST' ? 204 : 500, { message: 'busy' });
    else if ((looked += 1) < 4) answer(response, 200, { State: { Status: 'running', Running: true } });
    else answer(response, 404, { message: 'no such container' });
  });
  await proveRemoved(slow, 'x');
  expect(asked.slice(0, 3)).toEqual(['GET', 'POST', 'DELETE']);
  expect(looked).toBe(4);

  const stuck = await engineSaying((request, response) =>
    answer(response, request.method === 'GET' ? 200 : 204, { State: { Status: 'removing' } }),
  );
  await expect(proveRemoved(stuck, 'x', { withinMs: 200 })).rejects.toMatchObject({
    code: 'unavailable',
    message: expect.stringMatching(
      /container x on tcp.* is not proven to be removed after 200 ms: the engine shows it as removing/,
    ) as string,
  });
});
