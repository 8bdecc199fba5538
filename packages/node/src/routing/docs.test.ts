/** docs/routing.md says what the code does. */
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import type { Json, JsonObject } from '@millrace/runner';
import { selectorFromFilters, selectorMatches } from '@millrace/runner/model';
import {
  DEFAULT_FLOOR_MS,
  DEFAULT_QUEUE_LIMIT,
  SupervisionBounds,
  type SupervisionOptions,
} from '../supervision/policy.ts';

const page = await readFile(new URL('../../../../docs/routing.md', import.meta.url), 'utf8');
const blocks = (language: string): string[] =>
  [...page.matchAll(new RegExp(`\`\`\`${language}\\n([\\s\\S]*?)\`\`\``, 'g'))].map(([, text = '']) => text);

test('the filters it shows are understood', () => {
  const filters = JSON.parse(blocks('json')[0]!) as Json;
  const selector = selectorFromFilters(filters);
  expect(selectorMatches(selector, { zone: 'eu', gpu: 'h100', driver: '535' })).toBe(true);
  expect(selectorMatches(selector, { zone: 'eu', gpu: 'h100', driver: '525' })).toBe(false);
  expect(selectorMatches(selector, { zone: 'eu', gpu: 'h100', driver: '535', spot: 'yes' })).toBe(false);
});

test('the supervision it shows is taken, with the defaults it names', () => {
  const meta = JSON.parse(blocks('json')[1]!) as JsonObject;
  const asked = new SupervisionBounds().of(meta);
  expect(asked).toMatchObject({ restart: { type: 'onFailure' }, maxRetries: 3, timeoutMs: 60_000 });
  expect(new SupervisionBounds().of(null).backoff).toEqual(asked.backoff);
  expect([DEFAULT_FLOOR_MS, DEFAULT_QUEUE_LIMIT]).toEqual([100, 100]);
});

test('the bounds it shows are taken', () => {
  const text = blocks('ts')[1]!;
  const [, literal = ''] = /supervision: (\{[\s\S]*?\n  \}),/.exec(text) ?? [];
  const json = literal
    .replaceAll(/(\w+):/g, '"$1":')
    .replaceAll("'", '"')
    .replaceAll(/(?<=\d)_(?=\d)/g, '')
    .replaceAll(/,(?=\s*\})/g, '');
  const options = JSON.parse(json) as SupervisionOptions;
  const bounds = new SupervisionBounds(options);
  expect(bounds.of(null)).toMatchObject({
    restart: { type: 'onFailure' },
    maxRetries: 2,
    timeoutMs: 600_000,
  });
  expect(() => bounds.of({ supervision: { maxRetries: 6 } })).toThrow(/maxRetries must be at most 5/);
});

test('the example for embedders runs as it stands', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'millrace-docs-'));
  try {
    // The packages are not installed in a temporary folder; everything else is as a reader copies it.
    const text = blocks('js')[0]!
      .replace("'@millrace/node'", JSON.stringify(new URL('../index.js', import.meta.url).href))
      .replace("'@millrace/runner/model'", JSON.stringify(import.meta.resolve('@millrace/runner/model')));
    await writeFile(join(dir, 'example.mjs'), text);
    const { stdout } = await promisify(execFile)(process.execPath, ['example.mjs'], { cwd: dir });
    expect(stdout).toBe('shell-demo-1 1 echo\n');
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
});
