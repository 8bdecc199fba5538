/**
 * Keeps the dependency arrows honest: npm hoists every workspace and `tsc -b` accepts a cycle, so nothing else would
 * notice a package that imports what it does not declare, reaches into another's files, or points an arrow back.
 */
import { readFileSync, readdirSync } from 'node:fs';
import { builtinModules } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');

/** Which of our packages each may import. */
const ARROWS: Readonly<Record<string, readonly string[]>> = {
  '@millrace/runner': [],
  '@millrace/exec': ['@millrace/runner'],
  '@millrace/dispatch': ['@millrace/runner'],
  '@millrace/node': ['@millrace/runner', '@millrace/dispatch'],
  '@millrace/compute': ['@millrace/runner'],
  '@millrace/runtime': ['@millrace/runner', '@millrace/exec'],
  millrace: [
    '@millrace/runner',
    '@millrace/exec',
    '@millrace/dispatch',
    '@millrace/node',
    '@millrace/compute',
    '@millrace/runtime',
  ],
};

interface Manifest {
  readonly name: string;
  readonly dependencies?: Readonly<Record<string, string>>;
  readonly devDependencies?: Readonly<Record<string, string>>;
  readonly exports?: Readonly<Record<string, unknown>>;
}

const packages = readdirSync(path.join(ROOT, 'packages')).map((folder) => {
  const dir = path.join(ROOT, 'packages', folder);
  const manifest = JSON.parse(readFileSync(path.join(dir, 'package.json'), 'utf8')) as Manifest;
  return { dir, manifest };
});
const exportsOf = new Map(
  packages.map(({ manifest }) => [manifest.name, Object.keys(manifest.exports ?? {})]),
);

function* sources(dir: string): Generator<string> {
  for (const entry of readdirSync(dir, { withFileTypes: true })) {
    const file = path.join(dir, entry.name);
    if (entry.isDirectory()) yield* sources(file);
    else if (/\.m?ts$/.test(entry.name)) yield file;
  }
}

/** Static imports, which stand at the top of a file (further down, a line that looks like one is text), and dynamic ones. */
function* importsOf(file: string): Generator<string> {
  const text = readFileSync(file, 'utf8');
  const STATEMENT =
    /\s*(?:\/\/[^\n]*|\/\*[^]*?\*\/|#![^\n]*|(?:import|export)\s(?:[^'"`;=()]*?\sfrom\s+)?'([^']+)';)/y;
  for (let match = STATEMENT.exec(text); match; match = STATEMENT.exec(text)) {
    if (match[1] !== undefined) yield match[1];
  }
  if (isTest(file)) return;
  for (const match of text.matchAll(/(?<![*`'"].*)\bimport\(\s*'([^']+)'\s*\)/g)) yield match[1]!;
}

function isTest(file: string): boolean {
  return /\.test(?:\.support)?\.ts$|[-/]suite\.ts$|\/simulation\/|\/fixtures\//.test(file);
}

function packageOf(specifier: string): string {
  const parts = specifier.split('/');
  return specifier.startsWith('@') ? parts.slice(0, 2).join('/') : parts[0]!;
}

describe('the import arrows', () => {
  test('cover every package', () => {
    expect(packages.map(({ manifest }) => manifest.name).sort()).toEqual(Object.keys(ARROWS).sort());
  });

  for (const { dir, manifest } of packages) {
    describe(manifest.name, () => {
      const files = [...sources(path.join(dir, 'src'))];

      test('declares only dependencies its arrows allow', () => {
        const ours = Object.keys(manifest.dependencies ?? {}).filter((name) => exportsOf.has(name));
        expect(ours.filter((name) => !ARROWS[manifest.name]!.includes(name))).toEqual([]);
      });

      test('imports only what it declares, through public entry points', () => {
        const wrong: string[] = [];
        for (const file of files) {
          const inTest = isTest(file);
          for (const specifier of importsOf(file)) {
            if (specifier.startsWith('.')) {
              const target = path.resolve(path.dirname(file), specifier);
              if (!target.startsWith(path.join(dir, 'src') + path.sep))
                wrong.push(`${file}: ${specifier} leaves the package`);
              if (!/\.m?ts$/.test(specifier)) wrong.push(`${file}: ${specifier} lacks its extension`);
              continue;
            }
            if (specifier.startsWith('node:')) continue;
            const name = packageOf(specifier);
            if (builtinModules.includes(name)) wrong.push(`${file}: ${specifier} lacks node:`);
            const declared = Object.hasOwn(manifest.dependencies ?? {}, name);
            const allowedInTests =
              ['vitest', 'fast-check'].includes(name) || Object.hasOwn(manifest.devDependencies ?? {}, name);
            if (!declared && !(inTest && allowedInTests)) wrong.push(`${file}: ${specifier} is not declared`);
            const subpaths = exportsOf.get(name);
            if (subpaths && !subpaths.includes(`.${specifier.slice(name.length)}`)) {
              wrong.push(`${file}: ${specifier} is no public entry point`);
            }
          }
        }
        expect(wrong).toEqual([]);
      });
    });
  }
});
