/**
 * A TypeScript or JavaScript file and all it imports, as one module: the artifact of the `quickjs` engine. The same
 * sources give the same bytes on any machine, so nothing of the machine may get in. esbuild writes the paths of
 * modules into its output; every module is therefore given a name that only depends on the sources: its path
 * from the entry's folder, or for a package its name, version and path within it, wherever it is installed.
 */
import { readFile, realpath } from 'node:fs/promises';
import { builtinModules } from 'node:module';
import path from 'node:path';
import type { BuildOptions, Message, OnResolveArgs, Plugin, PluginBuild } from 'esbuild';
import { computeError } from '../errors.ts';

export interface Bundle {
  readonly code: string;
  /** Source map of {@link code}, by the names of {@link files}. */
  readonly map: string;
  readonly files: readonly BundledFile[];
}

/** A file that went into a bundle. */
export interface BundledFile {
  /** From the entry's folder, with forward slashes; of a package `node_modules/name@version/…`. */
  readonly path: string;
  /** With line feeds. */
  readonly content: string;
}

/** All modules live in this namespace of esbuild's, so that it knows them by our names. */
const NAMESPACE = 'compute';
const LOADERS = {
  '.ts': 'ts',
  '.mts': 'ts',
  '.js': 'js',
  '.mjs': 'js',
  '.cjs': 'js',
  '.json': 'json',
  '.txt': 'text',
} as const;
const BUILTINS = new Set(builtinModules);

/** What the output depends on besides the sources. A change here changes every digest. */
const FIXED: BuildOptions = {
  bundle: true,
  write: false,
  metafile: true,
  format: 'esm',
  platform: 'neutral',
  target: 'es2022',
  charset: 'utf8',
  treeShaking: true,
  minify: false,
  legalComments: 'none',
  mainFields: ['module', 'main'],
  conditions: ['import', 'module', 'default'],
  define: { 'process.env.NODE_ENV': '"production"' },
  sourcemap: 'external',
  sourcesContent: false,
  logLevel: 'silent',
  // A tsconfig.json that happens to be above the sources says nothing about them.
  tsconfigRaw: { compilerOptions: { target: 'es2022', useDefineForClassFields: true } },
  resolveExtensions: ['.ts', '.mts', '.js', '.mjs', '.cjs', '.json'],
};

/**
 * Bundles an entry file.
 *
 * @throws MillraceError `invalid_argument` (reason `module`) with every problem as `file:line:column: what`, for a syntax
 * error, an import that cannot be found, a Node.js built-in, or a missing default export.
 */
export async function bundle(entry: string): Promise<Bundle> {
  const { build } = await import('esbuild');
  const root = path.dirname(entry);
  const names = new Names(await realpath(root));
  const result = await build({
    ...FIXED,
    absWorkingDir: root,
    entryPoints: [entry],
    outfile: path.join(root, 'compute.js'),
    plugins: [namedSources(names)],
  }).catch((error: unknown) => {
    throw buildError(entry, error);
  });
  const output = Object.values(result.metafile?.outputs ?? {}).find((one) => one.entryPoint !== undefined);
  const label = path.basename(entry);
  if (output?.exports.includes('default') !== true) {
    throw refused(
      `${label}:1:1: it has no default export; a compute is the function its module exports as default`,
    );
  }
  const text = (suffix: string): string =>
    result.outputFiles?.find((file) => file.path.endsWith(suffix))?.text ?? '';
  return { code: text('compute.js'), map: text('.map'), files: names.files() };
}

/** Names of the files, and what is in them. */
class Names {
  readonly #root: string;
  readonly #byName = new Map<string, { readonly file: string; content: string | null }>();

  constructor(root: string) {
    this.#root = root;
  }

  /** The name of a file, from its real path. */
  async of(file: string): Promise<string> {
    const real = await realpath(file);
    const name = (await packageName(real)) ?? slashes(path.relative(this.#root, real));
    if (!this.#byName.has(name)) this.#byName.set(name, { file: real, content: null });
    return name;
  }

  async read(
    name: string,
  ): Promise<{ readonly content: string; readonly dir: string; readonly ext: string }> {
    const known = this.#byName.get(name);
    if (known === undefined) throw new Error(`${name} was never named`);
    known.content ??= (await readFile(known.file, 'utf8')).replace(/^\uFEFF/, '').replaceAll('\r\n', '\n');
    return { content: known.content, dir: path.dirname(known.file), ext: path.extname(known.file) };
  }

  files(): BundledFile[] {
    return [...this.#byName]
      .flatMap(([name, { content }]) => (content === null ? [] : [{ path: name, content }]))
      .sort((a, b) => (a.path < b.path ? -1 : 1));
  }
}

/** `node_modules/name@version/path` of a file that belongs to an installed package, else `null`. */
async function packageName(file: string): Promise<string | null> {
  const marker = `${path.sep}node_modules${path.sep}`;
  const at = file.lastIndexOf(marker);
  if (at < 0) return null;
  const parts = file.slice(at + marker.length).split(path.sep);
  const count = parts[0]?.startsWith('@') === true ? 2 : 1;
  const folder = file.slice(0, at + marker.length) + parts.slice(0, count).join(path.sep);
  const manifest = JSON.parse(await readFile(path.join(folder, 'package.json'), 'utf8')) as {
    version?: unknown;
  };
  const version = typeof manifest.version === 'string' ? manifest.version : '0.0.0';
  return ['node_modules', `${parts.slice(0, count).join('/')}@${version}`, ...parts.slice(count)].join('/');
}

function slashes(relative: string): string {
  return relative.split(path.sep).join('/');
}

function namedSources(names: Names): Plugin {
  return {
    name: 'millrace-compute',
    setup(build: PluginBuild): void {
      build.onResolve({ filter: /.*/ }, async (args) => {
        // Our own question to esbuild's resolver, below.
        if (args.pluginData === names) return undefined;
        const builtin = args.path.startsWith('node:');
        const found = builtin ? null : await resolve(build, args.path, args);
        // A package may be named like a built-in; one that is installed counts.
        if (found === null || (found.errors.length > 0 && BUILTINS.has(args.path))) {
          return {
            errors: [
              {
                text: `it imports the Node.js built-in ${JSON.stringify(args.path)}; a compute runs without Node.js: no files, no network, no processes`,
              },
            ],
          };
        }
        if (found.errors.length > 0) return { errors: found.errors, warnings: found.warnings };
        if (found.namespace !== 'file' || found.external) {
          return { errors: [{ text: `it imports ${JSON.stringify(args.path)}, which is no file` }] };
        }
        return { path: await names.of(found.path), namespace: NAMESPACE, sideEffects: found.sideEffects };
      });
      build.onLoad({ filter: /.*/, namespace: NAMESPACE }, async (args) => {
        const { content, dir, ext } = await names.read(args.path);
        const loader = (LOADERS as Readonly<Record<string, (typeof LOADERS)[keyof typeof LOADERS]>>)[ext];
        if (loader === undefined) {
          return {
            errors: [
              { text: `${args.path} has the ending "${ext}"; it may be ${Object.keys(LOADERS).join(', ')}` },
            ],
          };
        }
        return { contents: content, loader, resolveDir: dir };
      });

      async function resolve(
        from: PluginBuild,
        wanted: string,
        args: OnResolveArgs,
      ): ReturnType<PluginBuild['resolve']> {
        return from.resolve(wanted, {
          resolveDir: args.resolveDir,
          kind: args.kind,
          namespace: 'file',
          pluginData: names,
        });
      }
    },
  };
}

function buildError(entry: string, error: unknown): Error {
  const messages = (error as { readonly errors?: readonly Message[] }).errors;
  if (messages === undefined || messages.length === 0) {
    return computeError('internal', 'host', `compute: esbuild failed on ${entry}`, { cause: error });
  }
  return refused(messages.map((message) => formatMessage(message, entry)).join('\n'));
}

/** `file:line:column: text`, as editors understand it. */
function formatMessage({ text, location }: Message, entry: string): string {
  if (location === null) return `${path.basename(entry)}: ${text}`;
  const file = location.file.replace(/^compute:/, '');
  return `${file}:${location.line}:${location.column + 1}: ${text}`;
}

function refused(problems: string): Error {
  return computeError('invalid_argument', 'module', `compute: cannot build\n${problems}`, {
    details: { problems: problems.split('\n') },
  });
}
