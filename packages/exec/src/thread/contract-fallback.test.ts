import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { openThreadRunner } from '../thread-runner.ts';

const MODULE = (capability: string): string =>
  `import { MillraceError, defineRunner } from '@millrace/runner';
export default defineRunner({ capability: '${capability}', async run() { throw new MillraceError('not_found', 'x'); } });`;

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-contract-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function write(name: string, text: string): Promise<string> {
  const path = join(folder, name);
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, text);
  return path;
}

test.each([
  ['JavaScript', 'plain.mjs'],
  ['TypeScript that is CommonJS to Node', 'common.ts'],
  ['TypeScript that is a module to Node', 'module.mts'],
])('%s in a folder without any package finds the contract', async (_name, file) => {
  await using runner = await openThreadRunner({ module: await write(file, MODULE('/test/lent/v1')) });
  expect(runner.capability).toBe('/test/lent/v1');
});

test('a copy installed beside the module comes first', async () => {
  await write(
    'own/node_modules/@millrace/runner/package.json',
    '{"name":"@millrace/runner","type":"module","exports":"./index.js"}',
  );
  await write(
    'own/node_modules/@millrace/runner/index.js',
    `export class MillraceError extends Error {}
     export const defineRunner = (runner) => ({ ...runner, capability: '/test/own/v1' });`,
  );
  await using runner = await openThreadRunner({
    module: await write('own/runner.mjs', MODULE('/test/lent/v1')),
  });
  expect(runner.capability).toBe('/test/own/v1');
});

test('other packages that are not installed stay missing', async () => {
  const module = await write('other.mjs', `import '@millrace/runner'; import '@millrace/dispatch';`);
  await expect(openThreadRunner({ module })).rejects.toThrow(/@millrace\/dispatch.*install the package/);
});
