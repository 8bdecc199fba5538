/**
 * The environment of code that runs tasks. The node's own holds its private key and its dispatcher's address,
 * so nothing is inherited but this list: where programs and files are, how text and time are written, and
 * `NODE_ENV`.
 */
const INHERITED: readonly string[] = [
  'PATH',
  'HOME',
  'USER',
  'LANG',
  'LANGUAGE',
  'LC_ALL',
  'LC_CTYPE',
  'TZ',
  'TMPDIR',
  'TMP',
  'TEMP',
  'NODE_ENV',
  // Windows programs do not start without these.
  'SystemRoot',
  'SystemDrive',
  'ComSpec',
  'PATHEXT',
  'USERPROFILE',
  'APPDATA',
  'LOCALAPPDATA',
];

/** The inherited variables of `source`, and on top of them those that were granted by name. */
export function taskEnvironment(
  source: Readonly<Record<string, string | undefined>>,
  granted: Readonly<Record<string, string>> = {},
): Record<string, string> {
  const kept = INHERITED.flatMap((name): [string, string][] => {
    const value = source[name];
    return value === undefined ? [] : [[name, value]];
  });
  return { ...Object.fromEntries(kept), ...granted };
}
