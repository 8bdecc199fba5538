/** Turns what went wrong while a runner module was loaded into an error its author can act on. */
import { execFile } from 'node:child_process';
import { copyFile, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MillraceError, TaskAbort } from '@millrace/runner';

const CHECK_TIMEOUT_MS = 10_000;

/** For the node, which counts such trouble. */
const LOAD_FAILED = { ending: 'load_failed' };

/** @returns the error with the file's name, the place, and what to do. */
export async function loadProblem(
  path: string,
  error: unknown,
  env: Readonly<Record<string, string>>,
): Promise<Error> {
  if (TaskAbort.is(error)) return error;
  const what = `runner module ${path}`;
  if (MillraceError.is(error)) {
    const { code, details, retryable } = error;
    return new MillraceError(code, `${what}: ${error.message}`, {
      cause: error,
      details: { ...details, ...LOAD_FAILED },
      retryable,
    });
  }
  const { name, message, code } = error as Error & { readonly code?: string };
  if (code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND') {
    const [first] = message.split('\n');
    const advice = 'install the package in the folder of the module, or correct the import';
    return new MillraceError('not_found', `${what} imports what is not there: ${first}; ${advice}`, {
      cause: error,
      details: LOAD_FAILED,
    });
  }
  if (code === 'ERR_UNKNOWN_FILE_EXTENSION' && message.includes('.ts')) {
    const advice = 'a JavaScript module can import only JavaScript; name the runner module .ts';
    return new MillraceError('invalid_argument', `${what} imports TypeScript: ${message}; ${advice}`, {
      cause: error,
      details: LOAD_FAILED,
    });
  }
  if (name === 'TransformError' || name === 'SyntaxError') {
    const place = name === 'SyntaxError' ? await syntaxErrorPlace(path, error as Error, env) : null;
    // esbuild gives the place itself: a count, then `file:line:column: ERROR: text`.
    const problem =
      place === null
        ? message.replace(/^Transform failed with .*\n/, '').split('\n')[0]
        : `${place}: ${message}`;
    const advice = message.includes('Top-level await')
      ? '; name the file .mts, or put "type": "module" into the package.json beside it'
      : '; correct it and start again';
    return new MillraceError('invalid_argument', `${what} has a syntax error: ${problem}${advice}`, {
      cause: error,
      details: LOAD_FAILED,
    });
  }
  return new MillraceError('invalid_argument', `${what} threw while it was loaded: ${name}: ${message}`, {
    cause: error,
    details: LOAD_FAILED,
  });
}

/**
 * `file:line` of a syntax error, or null. V8 tells it only to whoever prints the error, so Node is asked to
 * check.
 */
async function syntaxErrorPlace(
  path: string,
  error: Error,
  env: Readonly<Record<string, string>>,
): Promise<string | null> {
  const told = placeIn(error.stack ?? '');
  if (told !== null) return told;
  const direct = await checkSyntax(path, env);
  if (direct !== null) return direct;
  // A .js file in a folder that does not say what it is passes Node 20's check without being looked at as a
  // module.
  const folder = await mkdtemp(join(tmpdir(), 'millrace-check-'));
  try {
    const copy = join(folder, 'module.mjs');
    await copyFile(path, copy);
    return (await checkSyntax(copy, env))?.replace(copy, path) ?? null;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

function checkSyntax(path: string, env: Readonly<Record<string, string>>): Promise<string | null> {
  return new Promise((resolve) => {
    const options = { env: { ...env }, timeout: CHECK_TIMEOUT_MS };
    execFile(process.execPath, ['--check', path], options, (_error, _stdout, stderr) =>
      resolve(placeIn(stderr)),
    );
  });
}

function placeIn(text: string): string | null {
  const [first = ''] = text.split('\n');
  const match = /^(file:\/\/\S+|\/.+|[A-Za-z]:\\.+):(\d+)$/.exec(first.trim());
  if (!match) return null;
  const [, file = '', line] = match;
  return `${file.startsWith('file:') ? fileURLToPath(file) : file}:${line}`;
}
