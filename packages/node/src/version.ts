/** The version a node tells when it registers. The service accepts SemVer and refuses labels such as `dev`. */

/** This package's version; a test keeps it equal to `package.json`. */
export const ENGINE_VERSION = '0.1.0';

// https://semver.org, the grammar of version 2.0.0.
const NUMBER = '(?:0|[1-9]\\d*)';
const PRE_RELEASE_PART = `(?:${NUMBER}|\\d*[a-zA-Z-][0-9a-zA-Z-]*)`;
const SEMVER = new RegExp(
  `^${NUMBER}\\.${NUMBER}\\.${NUMBER}(?:-${PRE_RELEASE_PART}(?:\\.${PRE_RELEASE_PART})*)?` +
    `(?:\\+[0-9a-zA-Z-]+(?:\\.[0-9a-zA-Z-]+)*)?$`,
);

/**
 * The version to send: `configured`, trimmed, when it is strict SemVer 2.0; without its leading `v` or `V` when it is
 * so then; {@link ENGINE_VERSION} when it is neither, blank or null. Always valid SemVer.
 *
 * @param warn called once when something other than what was configured is used; fits `Logger.warn`
 */
export function registrationVersion(
  configured: string | null,
  warn: (message: string, fields: { configured: string; used: string }) => void = () => undefined,
): string {
  const version = configured?.trim() ?? '';
  if (version === '') return ENGINE_VERSION;
  if (SEMVER.test(version)) return version;
  const bare = version.replace(/^v/i, '');
  const used = SEMVER.test(bare) ? bare : ENGINE_VERSION;
  warn('NODE_VERSION is no SemVer version such as 1.2.3; another one is registered', {
    configured: version,
    used,
  });
  return used;
}
