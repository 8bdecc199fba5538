import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, expect, test } from 'vitest';
import { probeContainerEngine } from './probe.ts';

const VERSION = { Version: '24.0.7', ApiVersion: '1.43', MinAPIVersion: '1.12', Components: [] };
const INFO = { MemoryLimit: true, SwapLimit: false, CPUCfsQuota: true, PidsLimit: true, SecurityOptions: [] };

/** What answers like an engine, as far as it is asked. */
async function engine(
  answers: Readonly<Record<string, unknown>>,
): Promise<{ host: string } & AsyncDisposable> {
  const server = createServer((request, response) => {
    const answer = answers[(request.url ?? '').replace(/^\/v[\d.]+/, '')];
    if (answer === undefined) response.writeHead(404).end('{"message":"no"}');
    else response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(answer));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  return {
    host: `tcp://127.0.0.1:${port}`,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

describe('a container engine', () => {
  test('that answers says who it is and what it can limit', async () => {
    await using there = await engine({ '/version': VERSION, '/info': INFO });
    expect(await probeContainerEngine({ host: there.host })).toEqual({
      available: true,
      reason: null,
      host: there.host,
      engine: 'Docker 24.0.7',
      rootless: false,
      limits: { memory: true, swap: false, cpus: true, pids: true },
    });
  });

  test('that cannot hold containers to their limits is not available, and the reason names them', async () => {
    const info = { ...INFO, PidsLimit: false, MemoryLimit: false, SecurityOptions: ['name=rootless'] };
    await using there = await engine({ '/version': VERSION, '/info': info });
    expect(await probeContainerEngine({ host: there.host })).toMatchObject({
      available: false,
      reason: expect.stringMatching(/^it cannot limit memory, pids;/),
      engine: 'Docker 24.0.7',
      rootless: true,
    });
  });

  test.each([
    ['unix:///no/such/engine.sock', /no container engine answers at unix:\/\/\/no\/such\/engine\.sock/],
    ['ssh://somewhere', /ssh/],
  ])('at %s is not there, with what to do', async (host, reason) => {
    const report = await probeContainerEngine({ host });
    expect(report).toMatchObject({ available: false, engine: null, rootless: null, limits: null });
    expect(report.reason).toMatch(reason);
  });

  test('that is too old is told', async () => {
    await using there = await engine({ '/version': { ...VERSION, ApiVersion: '1.20' } });
    const report = await probeContainerEngine({ host: there.host });
    expect(report.available).toBe(false);
    expect(report.reason).toMatch(/use Docker 19\.03 or later/);
  });

  test('that never answers is waited for no longer than asked', async () => {
    const silent = createServer(() => undefined);
    await new Promise<void>((resolve) => silent.listen(0, '127.0.0.1', resolve));
    const { port } = silent.address() as AddressInfo;
    const report = await probeContainerEngine({ host: `tcp://127.0.0.1:${port}`, callMs: 200 });
    expect(report).toMatchObject({ available: false, engine: null });
    silent.closeAllConnections();
    await new Promise((resolve) => silent.close(resolve));
  });
});
