import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { program } from './fixtures/wat.ts';

test('the example for embedders in docs/compute.md runs as it stands', async () => {
  const page = await readFile(new URL('../../../docs/compute.md', import.meta.url), 'utf8');
  const [, example = ''] = /```js\n([\s\S]*?)```/.exec(page) ?? [];
  const dir = await mkdtemp(join(tmpdir(), 'millrace-docs-'));
  try {
    const double = program('(call $write (i32.const 1) (i32.const 1024) (i32.const 8))', {
      fields: '(data (i32.const 1024) "{\\"n\\":42}")',
    });
    await writeFile(join(dir, 'double.wasm'), double);
    // The package is not installed in a temporary folder; everything else is as a reader copies it.
    const index = new URL('./index.js', import.meta.url).href;
    await writeFile(join(dir, 'example.mjs'), example.replace("'@millrace/compute'", JSON.stringify(index)));
    const { stdout, stderr } = await promisify(execFile)(process.execPath, ['example.mjs'], { cwd: dir });
    expect(stdout).toBe('{ n: 42 }\n');
    expect(stderr).toMatch(/^ok \d/);
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
});
