/** Both examples as their files in `bin`, driven as a node drives them. */
import { createHash } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { gunzipSync } from 'node:zlib';
import { createTestContext, type TestContext } from '@millrace/runner/testing';
import { golemRunner, offerOf, testRuntime } from '@millrace/runtime/supervisor';
import { describe, expect, test } from 'vitest';

const TEXT_TOOLS = fileURLToPath(new URL('../bin/text-tools.js', import.meta.url));
const PACKER = fileURLToPath(new URL('../bin/packer.js', import.meta.url));
const TEXT = 'the mill\nthe race, the water\n';

async function perform(path: string, commands: readonly object[]): Promise<TestContext> {
  const runner = golemRunner({ runtime: { path } });
  const ctx = createTestContext({
    inputs: { text: { content: TEXT, name: 'text.txt' } },
    task: {
      capability: runner.capability,
      meta: { exe_script: [{ deploy: {} }, { start: {} }, ...commands] } as never,
    },
  });
  await runner.run(ctx);
  return ctx;
}

function outputs(ctx: TestContext): (string | null)[] {
  const results = JSON.parse(Buffer.from(ctx.outputs.get('exe-results.json')!).toString()) as {
    stdout: string | null;
  }[];
  return results.slice(2).map(({ stdout }) => stdout);
}

const run = (entry_point: string, ...args: string[]): object => ({
  run: { entry_point, args, capture: { stdout: { atEnd: {} } } },
});

describe('text-tools', () => {
  test('count, rank, find and rewrite', async () => {
    await using ctx = await perform(TEXT_TOOLS, [
      run('count', '/in/text.txt'),
      run('top', '2', '/in/text.txt'),
      run('search', 'r.ce', '/in/text.txt'),
      run('replace', 'the', 'a', '/in/text.txt', '/out/new.txt'),
    ]);
    expect(outputs(ctx)).toEqual([`2 6 29 /in/text.txt\n`, '3 the\n1 mill\n', 'the race, the water\n', null]);
    expect(Buffer.from(ctx.outputs.get('new.txt')!).toString()).toBe('a mill\na race, a water\n');
    expect(ctx.events).toContainEqual({ type: 'exe_counter', name: 'text-tools.bytes-read', value: 29 });
  });

  test('say what they cannot do', async () => {
    await expect(perform(TEXT_TOOLS, [run('fly')])).rejects.toThrow(
      'fly is no tool; there are count, search',
    );
    await expect(perform(TEXT_TOOLS, [run('count', '/etc/passwd')])).rejects.toThrow('exited with code 2');
    await expect(perform(TEXT_TOOLS, [run('search', 'absent', '/in/text.txt')])).rejects.toThrow('code 1');
  });

  test('tell in the offer what they are', async () => {
    expect((await offerOf({ runtimePath: TEXT_TOOLS })).offer.properties).toEqual({
      'golem.runtime.text-tools': ['count', 'search', 'top', 'replace'],
    });
  });
});

describe('packer', () => {
  test('digests and packs', async () => {
    await using ctx = await perform(PACKER, [
      run('sha256', '/in/text.txt'),
      run('gzip', '/in/text.txt', '/out/text.gz'),
      run('gunzip', '/out/text.gz', '/out/again.txt'),
    ]);
    const digest = createHash('sha256').update(TEXT).digest('hex');
    expect(outputs(ctx)).toEqual([`${digest}  /in/text.txt\n`, null, null]);
    expect(gunzipSync(ctx.outputs.get('text.gz')!).toString()).toBe(TEXT);
    expect(Buffer.from(ctx.outputs.get('again.txt')!).toString()).toBe(TEXT);
  });

  test('passes its self-test', async () => {
    expect(await testRuntime({ runtimePath: PACKER })).toMatchObject({ exitCode: 0 });
  });
});
