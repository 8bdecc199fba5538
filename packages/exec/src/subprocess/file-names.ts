/** Names that come from a task or from a program and become paths. */
import { MillraceError } from '@millrace/runner';

/** The longest path of an output, and of a file name; more no file system takes in one name. */
export const MAX_NAME_BYTES = 255;

/**
 * A relative path of one or more segments, none of which leads elsewhere. `what` names it in the error.
 *
 * @throws MillraceError `invalid_argument`, naming the rule and the value.
 */
export function checkRelativePath(what: string, path: string): string {
  const problem = pathProblem(path);
  if (problem === null) return path;
  throw new MillraceError('invalid_argument', `${what} ${shown(path)} ${problem}`);
}

/** As {@link checkRelativePath}, of a single segment. */
export function checkFileName(what: string, name: string): string {
  const problem = name.includes('/') ? 'must be a file name without "/"' : pathProblem(name);
  if (problem === null) return name;
  throw new MillraceError('invalid_argument', `${what} ${shown(name)} ${problem}`);
}

/** The rule a path breaks; null when it is fine. */
export function pathProblem(path: string): string | null {
  if (path === '') return 'must not be empty';
  if (path.startsWith('/')) return 'must not be absolute';
  if (Buffer.byteLength(path) > MAX_NAME_BYTES) {
    return `must be at most ${MAX_NAME_BYTES} bytes long, it has ${Buffer.byteLength(path)}`;
  }
  // Decoded bytes that were no UTF-8 have become U+FFFD, and would no longer name the same file.
  if (/[\p{Cc}\p{Cs}\\\uFFFD]/u.test(path)) {
    return 'must not contain control characters, backslashes or broken UTF-8';
  }
  if (path.split('/').some((segment) => segment === '' || segment === '.' || segment === '..')) {
    return 'must not have empty, "." or ".." segments';
  }
  return null;
}

/** Quoted, and short enough for an error. */
export function shown(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text);
}
