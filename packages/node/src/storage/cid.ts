/** From a CID, as tasks name their inputs, to a request of the lease's domain server. */
import { MillraceError } from '@millrace/runner';
import type { DownloadQuery } from '@millrace/dispatch/client';

/** Where the task's data is. */
export interface DomainAddress {
  readonly id: string;
  readonly serverUrl: string;
}

/**
 * A CID is a data id of the lease's domain, or a URL of its server (relative ones begin with a slash), of which path and
 * query count: `…/domains/{D}/data[/{id}]`, `ids`, and the first `name` and `data_type`.
 *
 * @throws MillraceError `invalid_argument` when it is empty, no URL, or names neither an id nor a name, which would
 * be the whole domain; `permission_denied` for another host or domain.
 */
export function parseCid(cid: string, domain: DomainAddress): DownloadQuery {
  const text = cid.trim();
  if (text === '') throw new MillraceError('invalid_argument', 'input CID must not be empty');
  if (!text.includes('://') && !text.startsWith('/')) return { domainId: domain.id, ids: [text] };

  const shown = JSON.stringify(text.slice(0, 200));
  const server = new URL(domain.serverUrl);
  if (!URL.canParse(text, server.href)) {
    throw new MillraceError('invalid_argument', `input CID ${shown} is not a valid URL`);
  }
  const url = new URL(text, server);
  // A path that begins with two slashes is a URL with a host, too.
  if (url.protocol !== server.protocol || url.host !== server.host) {
    throw new MillraceError(
      'permission_denied',
      `input CID ${shown} is not on this task's domain server ${server.origin}; inputs are data ids or URLs of that server`,
    );
  }
  const match = /domains\/([^/]+)\/data(?:\/([^/]+))?/.exec(url.pathname);
  const domainId = decoded(match?.[1]) ?? domain.id;
  if (domainId.toLowerCase() !== domain.id.toLowerCase()) {
    throw new MillraceError(
      'permission_denied',
      `input CID ${shown} is in domain ${domainId}, this task may read domain ${domain.id} only`,
    );
  }
  const inPath = decoded(match?.[2]);
  const ids =
    inPath === undefined
      ? url.searchParams
          .getAll('ids')
          .flatMap((list) => list.split(','))
          .map((id) => id.trim())
          .filter((id) => id !== '')
      : [inPath];
  const name = url.searchParams.get('name');
  const dataType = url.searchParams.get('data_type');
  if (ids.length === 0 && (name === null || name === '')) {
    throw new MillraceError(
      'invalid_argument',
      `input CID ${shown} names neither a data id nor a name, which would be the whole domain`,
    );
  }
  return {
    domainId: domain.id,
    ids,
    ...(name === null || name === '' ? {} : { name }),
    ...(dataType === null || dataType === '' ? {} : { dataType }),
  };
}

function decoded(segment: string | undefined): string | undefined {
  if (segment === undefined) return undefined;
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment; // Not encoded in any known way: sent on as it stands, the server knows no such id.
  }
}
