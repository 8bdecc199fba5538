/**
 * Proof of identity by wallet: the key, the message a service wants signed, the signature, and the way back from
 * message and signature to the wallet. Both sides of DDS use it.
 *
 * The layout is the service's own and not strict EIP-4361: one empty line after the address although there is no
 * statement, and an address without the mixed-case checksum. Libraries for EIP-4361 refuse it for both reasons.
 * Signatures are EIP-191 (`personal_sign`), RFC 6979, low-S.
 *
 * Source: posemesh DDS as the reference compute node uses it; vectors in `siwe.test.ts`.
 */
import { secp256k1 } from '@noble/curves/secp256k1.js';
import { keccak_256 } from '@noble/hashes/sha3.js';
import { MillraceError } from '@millrace/runner';
import { timestamp } from '@millrace/runner/decode';
import type { SiweChallenge } from './client/dds.ts';

const ACCOUNT_LINE = ' wants you to sign in with your Ethereum account:';

/** A message taken apart. `null` where an optional field is absent. */
export interface SiweMessage {
  readonly domain: string;
  /** Lower case `0x…`, whatever case the message has it in. */
  readonly address: string;
  /** Its lines joined by `\n`. */
  readonly statement: string | null;
  readonly uri: string;
  readonly version: string;
  readonly chainId: number;
  readonly nonce: string;
  /** RFC 3339. */
  readonly issuedAt: string;
  /** RFC 3339. */
  readonly expirationTime: string | null;
  /** RFC 3339. */
  readonly notBefore: string | null;
  readonly requestId: string | null;
  readonly resources: readonly string[];
}

/** A new private key from the system's random source: 64 lower-case hex digits, no prefix. */
export function generatePrivateKeyHex(): string {
  return toHex(secp256k1.utils.randomSecretKey());
}

/**
 * The wallet of a private key: `0x` and 40 lower-case hex digits, as it stands in JSON and in the signed message.
 *
 * @param privateKeyHex 64 hex digits in any case, `0x` before them allowed, surrounding blanks ignored
 * @throws MillraceError `invalid_argument` for anything else; the message never shows the key
 */
export function walletAddress(privateKeyHex: string): string {
  return addressOf(secp256k1.getPublicKey(privateKeyBytes(privateKeyHex), false));
}

/**
 * The text to sign: the challenge's values verbatim, lines joined by `\n`, no newline at the end.
 *
 * @param address as {@link walletAddress} gives it
 */
export function siweMessage(challenge: SiweChallenge, address: string): string {
  return [
    challenge.domain + ACCOUNT_LINE,
    address,
    '',
    `URI: ${challenge.uri}`,
    `Version: ${challenge.version}`,
    `Chain ID: ${challenge.chainId}`,
    `Nonce: ${challenge.nonce}`,
    `Issued At: ${challenge.issuedAt}`,
  ].join('\n');
}

/** What is signed for a message: Keccak-256 of the EIP-191 prefix, the message's length in bytes, and the message. */
export function messageDigest(message: string): Uint8Array {
  const bytes = new TextEncoder().encode(message);
  const prefix = new TextEncoder().encode(`\u0019Ethereum Signed Message:\n${bytes.length}`);
  return keccak_256.create().update(prefix).update(bytes).digest();
}

/**
 * Signs a message: `0x`, r, s, v as 130 lower-case hex digits, v being 27 or 28. Equal input gives equal output.
 *
 * @throws MillraceError `invalid_argument` for a bad key, as {@link walletAddress}
 */
export function signMessage(message: string, privateKeyHex: string): string {
  // `prehash` would hash the digest with SHA-256 once more. The recovery byte comes first here and last on the wire.
  const signature = secp256k1.sign(messageDigest(message), privateKeyBytes(privateKeyHex), {
    prehash: false,
    format: 'recovered',
  });
  return `0x${toHex(signature.subarray(1))}${toHex(Uint8Array.of(27 + signature[0]!))}`;
}

/**
 * The wallet that signed this exact text, lower case `0x…`. Costs about 1.5 ms of CPU: make every cheap check first.
 *
 * Accepts v as 0, 1, 27 and 28, since clients differ. Signatures with s in the upper half of the curve's order are
 * refused, so that nobody can make a second signature out of a first.
 *
 * @throws MillraceError `invalid_argument` when the signature is malformed or no key can have made it
 */
export function recoverAddress(message: string, signature: string): string {
  const digits = /^(?:0x)?([0-9a-f]{130})$/i.exec(signature)?.[1];
  if (digits === undefined) {
    throw invalid(`signature must be 0x and 130 hex digits, got ${signature.length} characters`);
  }
  const bytes = Buffer.from(digits, 'hex');
  const v = bytes[64]!;
  const recovery = v >= 27 ? v - 27 : v;
  if (recovery > 1) throw invalid(`signature must end in v 0, 1, 27 or 28, got ${v}`);
  try {
    const parsed = secp256k1.Signature.fromBytes(
      Uint8Array.of(recovery, ...bytes.subarray(0, 64)),
      'recovered',
    );
    if (parsed.hasHighS()) throw invalid('signature must have s in the lower half of the curve order');
    return addressOf(parsed.recoverPublicKey(messageDigest(message)).toBytes(false));
  } catch (error) {
    if (MillraceError.is(error)) throw error;
    throw new MillraceError('invalid_argument', 'signature is not one that any key can have made', {
      cause: error,
    });
  }
}

/** The fields of the message, by their names in the text. */
const FIELDS = [
  'URI',
  'Version',
  'Chain ID',
  'Nonce',
  'Issued At',
  'Expiration Time',
  'Not Before',
  'Request ID',
] as const;
type Field = (typeof FIELDS)[number];

const RESOURCES_LINE = 'Resources:';

/**
 * Takes a message apart the way the real service does, line by line and leniently: CRLF counts as LF, the address may
 * be in any case, a statement is optional, fields come in any order, empty lines between them are skipped and fields
 * of other names are ignored. A known field given twice is refused: two readers could see two different values.
 *
 * @throws MillraceError `invalid_argument` naming the line or the field
 */
export function parseSiweMessage(text: string): SiweMessage {
  const lines = text.replaceAll('\r\n', '\n').split('\n');
  if (lines.length < 6) throw invalid(`sign-in message must have at least 6 lines, got ${lines.length}`);
  const [first = '', second = '', third] = lines;
  if (!first.endsWith(ACCOUNT_LINE)) throw invalid(`sign-in message: line 1 must end in "${ACCOUNT_LINE}"`);
  const address = second.trim();
  if (!/^0x[0-9a-f]{40}$/i.test(address)) {
    throw invalid('sign-in message: line 2 must be an address, 0x and 40 hex digits');
  }
  if (third !== '') throw invalid('sign-in message: line 3 must be empty');

  let at = 3;
  while (at < lines.length && lines[at] !== '' && !startsField(lines[at]!)) at += 1;
  const statement = at > 3 ? lines.slice(3, at).join('\n') : null;

  const values = new Map<Field, string>();
  const resources: string[] = [];
  let inResources = false;
  for (; at < lines.length; at += 1) {
    const line = lines[at]!;
    if (line.trim() === '') continue;
    if (inResources && line.startsWith('- ')) {
      resources.push(line.slice(2));
      continue;
    }
    inResources = line.trimEnd() === RESOURCES_LINE;
    if (inResources) continue;
    const colon = line.indexOf(':');
    if (colon === -1) throw invalid(`sign-in message: line ${at + 1} must be "Key: value"`);
    const name = line.slice(0, colon);
    if (!isField(name)) continue;
    if (values.has(name)) throw invalid(`sign-in message: ${name} must be given once, got it twice`);
    values.set(name, line.slice(colon + 1).trim());
  }

  const required = (name: Field): string => {
    const value = values.get(name);
    if (value === undefined || value === '') throw invalid(`sign-in message: ${name} is missing`);
    return value;
  };
  const time = (name: Field): string | null => {
    const value = values.get(name);
    if (value !== undefined && !isTimestamp(value)) {
      throw invalid(`sign-in message: ${name} must be an RFC 3339 time with Z or an offset`);
    }
    return value ?? null;
  };
  const chainId = required('Chain ID');
  if (!/^\d+$/.test(chainId) || !Number.isSafeInteger(Number(chainId))) {
    throw invalid('sign-in message: Chain ID must be a decimal integer');
  }
  required('Issued At');
  return {
    domain: first.slice(0, -ACCOUNT_LINE.length),
    address: address.toLowerCase(),
    statement,
    uri: required('URI'),
    version: required('Version'),
    chainId: Number(chainId),
    nonce: required('Nonce'),
    issuedAt: time('Issued At')!,
    expirationTime: time('Expiration Time'),
    notBefore: time('Not Before'),
    requestId: values.get('Request ID') ?? null,
    resources,
  };
}

function isField(name: string): name is Field {
  return (FIELDS as readonly string[]).includes(name);
}

function startsField(line: string): boolean {
  return line.startsWith(RESOURCES_LINE) || FIELDS.some((field) => line.startsWith(`${field}:`));
}

function isTimestamp(text: string): boolean {
  try {
    timestamp(text, 'time');
    return true;
  } catch {
    return false;
  }
}

function privateKeyBytes(privateKeyHex: string): Uint8Array {
  const rule = 'private key (SECP256K1_PRIVHEX) must be 64 hex digits with an optional 0x before them';
  const digits = privateKeyHex.trim().replace(/^0x/i, '');
  if (digits.length !== 64) throw invalid(`${rule}, got ${digits.length} characters`);
  if (!/^[0-9a-f]{64}$/i.test(digits)) throw invalid(`${rule}, got characters that are no hex digits`);
  const bytes = Uint8Array.from(Buffer.from(digits, 'hex'));
  if (!secp256k1.utils.isValidSecretKey(bytes)) {
    throw invalid(`${rule}, and a number from 1 to the order of secp256k1 less 1; this one is out of range`);
  }
  return bytes;
}

/** @param publicKey 65 bytes, uncompressed, with its leading 04 */
function addressOf(publicKey: Uint8Array): string {
  return `0x${toHex(keccak_256(publicKey.subarray(1)).subarray(12))}`;
}

function toHex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('hex');
}

function invalid(message: string): MillraceError {
  return new MillraceError('invalid_argument', message);
}
