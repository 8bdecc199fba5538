/** Where a Docker Engine API listens, as `DOCKER_HOST` says it. */
import { MillraceError } from '@millrace/runner';

/** Docker's own default on Linux. */
export const DEFAULT_ENGINE_HOST = 'unix:///var/run/docker.sock';

export interface EngineAddress {
  /** What requests are made to; a placeholder when they go through a socket file. */
  readonly origin: string;
  /** Null for TCP. */
  readonly socketPath: string | null;
  /** As it is shown in messages, and given to `DOCKER_HOST`. */
  readonly host: string;
}

/**
 * `unix:///path`, a bare absolute path, `tcp://host:port` or `http://host:port`. TCP has no encryption and no identity here,
 * so it is for an engine on this machine or behind a tunnel.
 *
 * @throws MillraceError `invalid_argument` for anything else: `ssh:`, `npipe:`, `fd:`, `https:`, a relative path, a missing port
 */
export function parseEngineHost(text: string): EngineAddress {
  const fail = (rule: string): never => {
    throw new MillraceError('invalid_argument', `container engine host ${JSON.stringify(text)} ${rule}`);
  };
  const socketPath = text.startsWith('/')
    ? text
    : text.startsWith('unix://')
      ? text.slice('unix://'.length)
      : null;
  if (socketPath !== null) {
    if (!socketPath.startsWith('/') || socketPath === '/') {
      return fail('must name a socket file by an absolute path, such as unix:///var/run/docker.sock');
    }
    return { origin: 'http://engine', socketPath, host: `unix://${socketPath}` };
  }
  const url = URL.canParse(text) ? new URL(text.replace(/^tcp:/, 'http:')) : null;
  if (url === null || url.protocol !== 'http:') {
    return fail(
      'must be unix:///path or tcp://host:port; reach an engine behind ssh or TLS through a local tunnel, such as ssh -L /tmp/engine.sock:/var/run/docker.sock HOST',
    );
  }
  const rest = url.pathname !== '/' || url.search !== '' || url.hash !== '' || url.username !== '';
  if (url.port === '' || rest) return fail('must be a host and a port only, such as tcp://127.0.0.1:2375');
  return { origin: url.origin, socketPath: null, host: `tcp://${url.host}` };
}
