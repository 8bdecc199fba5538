/** What goes through a task must not stay in memory: neither the node's nor the dispatcher's, each a process of its own. */
import { fork, type ChildProcess } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';

const MIB = 1024 * 1024;
const SIZE = 256 * MIB;
const MAX_GROWTH = 64 * MIB;

let dir: string;
let children: ChildProcess[];
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), 'millrace-memory-'));
  children = [];
});
afterEach(async () => {
  for (const child of children) {
    const gone = new Promise<void>((resolve) => void child.once('exit', () => resolve()));
    if (child.exitCode === null && child.signalCode === null) {
      child.kill('SIGKILL');
      await gone;
    }
  }
  await rm(dir, { recursive: true, force: true });
});

test('256 MiB in and out, grow neither node nor dispatcher by 64 MiB', async () => {
  const dispatcher = start('dispatcher', { DIR: dir });
  const { url, token, domain } = await message<{ url: string; token: string; domain: string }>(dispatcher);
  const node = start('node', { DIR: dir, URL_OF: url, TOKEN: token, DOMAIN: domain });
  await message(node);
  // Once small, so that what a process needs anyway is there before it is measured.
  for (const size of [24 * MIB, SIZE]) {
    const measured = size === SIZE;
    for (const way of ['openMultipart', 'putFile', 'openRead', 'materializeCidToTemp']) {
      if (measured) await Promise.all([ask(dispatcher, { watch: true }), ask(node, { watch: true })]);
      await ask(node, { way, size });
      if (!measured) continue;
      const growth = {
        node: (await ask<{ growth: number }>(node, { watch: false })).growth,
        dispatcher: (await ask<{ growth: number }>(dispatcher, { watch: false })).growth,
      };
      expect(growth.node, `node, ${way}: ${JSON.stringify(growth)}`).toBeLessThan(MAX_GROWTH);
      expect(growth.dispatcher, `dispatcher, ${way}: ${JSON.stringify(growth)}`).toBeLessThan(MAX_GROWTH);
    }
  }
}, 120_000);

function start(role: string, env: Record<string, string>): ChildProcess {
  const child = fork(fileURLToPath(new URL('./memory-process.test.support.js', import.meta.url)), [role], {
    env: { ...process.env, ...env },
    execArgv: [],
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
  });
  children.push(child);
  return child;
}

function message<T>(child: ChildProcess): Promise<T> {
  return new Promise((resolve, reject) => {
    const onExit = (code: number | null): void => reject(new Error(`the process ended with ${code}`));
    child.once('exit', onExit);
    child.once('message', (value: T & { error?: string }) => {
      child.off('exit', onExit);
      if (value.error === undefined) resolve(value);
      else reject(new Error(value.error));
    });
  });
}

function ask<T>(child: ChildProcess, request: object): Promise<T> {
  const answer = message<T>(child);
  child.send(request);
  return answer;
}
