/**
 * What a runtime sees of our environment. A node's own holds its keys, so only what is harmless and what runtimes are
 * known to read is handed on; everything else is granted by name.
 */
const HANDED_ON =
  /^(?:PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_[A-Z]+|TZ|TMPDIR|TEMP|TMP|NODE_ENV|XDG_[A-Z_]+|RUST_LOG|RUST_BACKTRACE|YA_RUNTIME_[A-Z_]+|YA_WASI_[A-Z_]+)$/;

/** @param granted variables added, or put in place of ours */
export function runtimeEnvironment(
  own: Readonly<Record<string, string | undefined>>,
  granted: Readonly<Record<string, string>> = {},
): Record<string, string> {
  const env: Record<string, string> = {};
  for (const [name, value] of Object.entries(own)) {
    if (value !== undefined && HANDED_ON.test(name)) env[name] = value;
  }
  return { ...env, ...granted };
}
