/**
 * Whether requests to an origin go through a proxy: the rules of `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` as curl and the
 * reference node have them. undici's own agent for these variables is not used: it reads the process's environment
 * whatever it is given, sends https through the http proxy, and knows no networks in `NO_PROXY`.
 */
import { BlockList, isIP } from 'node:net';

export interface ProxySettings {
  /** For http origins: `http(s)://[user:password@]host[:port]`. Null: none. */
  readonly http: string | null;
  /** For https origins. */
  readonly https: string | null;
  /**
   * Origins that are reached without: `*`, host names with everything below them (a dot before them does not matter),
   * IP addresses, and networks such as `10.0.0.0/8`; separated by commas or blanks.
   */
  readonly no: string;
}

/** The proxy for an origin, or null. */
export function proxyFor(url: URL, settings: ProxySettings | undefined): string | null {
  const proxy = (url.protocol === 'https:' ? settings?.https : settings?.http) ?? null;
  if (proxy === null) return null;
  const host = url.hostname.replace(/^\[|\]$/g, '').toLowerCase();
  const entries = settings!.no.split(/[\s,]+/).filter((entry) => entry !== '');
  return entries.some((entry) => covers(entry.toLowerCase(), host)) ? null : proxy;
}

function covers(entry: string, host: string): boolean {
  if (entry === '*') return true;
  const family = isIP(host);
  if (family === 0) {
    const name = entry.replace(/^\./, '');
    return host === name || host.endsWith(`.${name}`);
  }
  const [address = '', bits] = entry.replace(/^\[|\]$/g, '').split('/');
  if (isIP(address) !== family) return false;
  const longest = family === 4 ? 32 : 128;
  const prefix = bits === undefined ? longest : /^\d+$/.test(bits) ? Number(bits) : NaN;
  if (!(prefix <= longest)) return false;
  const list = new BlockList();
  const kind = family === 4 ? 'ipv4' : 'ipv6';
  list.addSubnet(address, prefix, kind);
  return list.check(host, kind);
}
