import { secp256k1 } from '@noble/curves/secp256k1.js';
import { MillraceError } from '@millrace/runner';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { SiweChallenge } from './client/dds.ts';
import {
  generatePrivateKeyHex,
  messageDigest,
  parseSiweMessage,
  recoverAddress,
  signMessage,
  siweMessage,
  walletAddress,
} from './siwe.ts';

const CURVE_ORDER = 0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141n;

// Published vectors of the protocol, computed with other libraries.
const VECTORS = [
  {
    key: '01'.repeat(32),
    address: '0x1a642f0e3c3af545e7acbd38b07251b3990914f1',
    challenge: {
      domain: '127.0.0.1:8080',
      uri: 'http://127.0.0.1:8080',
      version: '1',
      chainId: 8453,
      nonce: 'Zk3vQ9dL2mXa',
      issuedAt: '2026-05-04T03:02:01Z',
    },
    bytes: 212,
    digest: 'c6665f10b9c009533475dbf289ac23416dbfc50f658b4b8d4e16f01c6a61c368',
    signature:
      '0x8373807da61923110b8663184f3d131c446f7a0b2d158c64825b9ce98d627cfa1ef43d6f466710e47dad1d614a607b15427415552f467c53bca1644a4952a6051c',
  },
  {
    key: '4c0883a69102937d6231471b5dbb6204fe5129617082798ce3f4fdf2548b6f90',
    address: '0xfdbb6caf01414300c16ea14859fec7736d95355f',
    challenge: {
      domain: 'dds.example.com',
      uri: 'https://dds.example.com',
      version: '1',
      chainId: 8453,
      nonce: 'abc12345',
      issuedAt: '2026-01-01T00:00:00Z',
    },
    bytes: 211,
    digest: '11c401c7ce62d67d4e4c45af2876434a646e7e2ba39722a45c220ead43a855ef',
    signature:
      '0x1fac4c394326a403a2cfff9a6fab6b91ce0af62ebc28f2ffdad1646ef3a8e3435c32b90928761820afdcab7310e39a3534e5efcf84a92862bca85b0bae1560661c',
  },
] as const;

const VECTOR_A = VECTORS[0];

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

function refusal(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    if (MillraceError.is(error) && error.code === 'invalid_argument') return error.message;
    throw error;
  }
  throw new Error('nothing was refused');
}

describe('the published vectors', () => {
  test.each(VECTORS)(
    '$address: address, message, digest and signature are byte for byte the same',
    (vector) => {
      const message = siweMessage(vector.challenge, vector.address);
      expect(walletAddress(vector.key)).toBe(vector.address);
      expect(Buffer.byteLength(message)).toBe(vector.bytes);
      expect(hex(messageDigest(message))).toBe(vector.digest);
      expect(signMessage(message, vector.key)).toBe(vector.signature);
      expect(recoverAddress(message, vector.signature)).toBe(vector.address);
    },
  );

  test('a message of five bytes is signed as published', () => {
    const signature =
      '0x0a963a98c925b921d4b243e5bdd7cad167ec2cff6d4ccdc642efb9ed7600d01c3ba33103d0d22183bfa85da22f3b7475092f95439cb50c9ec9597076e34c21b91b';
    expect(hex(messageDigest('hello'))).toBe(
      '50b2c43fd39106bafbba0da34fc430e1f91e3c96ea2acee2bc34119f92b37750',
    );
    expect(signMessage('hello', VECTORS[1].key)).toBe(signature);
    expect(recoverAddress('hello', signature)).toBe(VECTORS[1].address);
  });

  test('a fourth key has its published address', () => {
    expect(walletAddress('e331b6d69882b4ed5bb7f55b585d7d0f7dc3aeca4a3deee8d16bde3eca51aace')).toBe(
      '0xd182e2bdd769a7e299d1257b29331975311d7003',
    );
  });

  test('the layout has one empty line and no newline at the end', () => {
    expect(siweMessage(VECTOR_A.challenge, VECTOR_A.address)).toBe(
      '127.0.0.1:8080 wants you to sign in with your Ethereum account:\n' +
        '0x1a642f0e3c3af545e7acbd38b07251b3990914f1\n\nURI: http://127.0.0.1:8080\nVersion: 1\nChain ID: 8453\n' +
        'Nonce: Zk3vQ9dL2mXa\nIssued At: 2026-05-04T03:02:01Z',
    );
  });
});

describe('private keys', () => {
  test('a prefix, upper case and surrounding blanks do not matter', () => {
    const key = VECTORS[1].key;
    for (const spelling of [`0x${key}`, `0X${key}`, key.toUpperCase(), ` ${key}\n`]) {
      expect(walletAddress(spelling)).toBe(VECTORS[1].address);
    }
  });

  test('the smallest and the largest key of the curve work, and one past either end does not', () => {
    const digits = (value: bigint): string => value.toString(16).padStart(64, '0');
    expect(walletAddress(digits(1n))).toMatch(/^0x[0-9a-f]{40}$/);
    expect(walletAddress(digits(CURVE_ORDER - 1n))).toMatch(/^0x[0-9a-f]{40}$/);
    for (const value of [0n, CURVE_ORDER]) {
      expect(refusal(() => walletAddress(digits(value)))).toMatch(/out of range/);
    }
  });

  test('a malformed key is refused by name and rule, and the message does not show it', () => {
    for (const key of ['', '0x', 'ab'.repeat(31), 'ab'.repeat(33), `${'ab'.repeat(31)}zz`]) {
      const message = refusal(() => signMessage('hello', key));
      expect(message).toMatch(/SECP256K1_PRIVHEX.*64 hex digits/);
      expect(message).not.toContain('abab');
    }
  });

  test('generated keys are 64 lower-case hex digits and differ', () => {
    const keys = Array.from({ length: 20 }, generatePrivateKeyHex);
    expect(new Set(keys).size).toBe(20);
    for (const key of keys) {
      expect(key).toMatch(/^[0-9a-f]{64}$/);
      expect(walletAddress(key)).toMatch(/^0x[0-9a-f]{40}$/);
    }
  });
});

describe('signatures', () => {
  test('what any key signs recovers to its wallet, for any text, and to no other for any other text', () => {
    fc.assert(
      fc.property(
        fc.bigInt({ min: 1n, max: CURVE_ORDER - 1n }),
        fc.string({ unit: 'binary', maxLength: 300 }),
        (secret, message) => {
          const key = secret.toString(16).padStart(64, '0');
          const signature = signMessage(message, key);
          expect(signature).toMatch(/^0x[0-9a-f]{128}1[bc]$/);
          expect(recoverAddress(message, signature)).toBe(walletAddress(key));
          expect(recoverAddress(`${message}.`, signature)).not.toBe(walletAddress(key));
        },
      ),
      { numRuns: 40 },
    );
  });

  test('v is accepted as 0, 1, 27 and 28 and refused as anything else', () => {
    const message = siweMessage(VECTOR_A.challenge, VECTOR_A.address);
    const withV = (v: number): string => VECTOR_A.signature.slice(0, -2) + v.toString(16).padStart(2, '0');
    expect(recoverAddress(message, withV(28))).toBe(VECTOR_A.address);
    expect(recoverAddress(message, withV(1))).toBe(VECTOR_A.address);
    expect(recoverAddress(message, withV(27))).toBe(recoverAddress(message, withV(0)));
    expect(recoverAddress(message, withV(27))).not.toBe(VECTOR_A.address);
    for (const v of [2, 3, 26, 29, 30, 255]) {
      expect(refusal(() => recoverAddress(message, withV(v)))).toMatch(new RegExp(`27 or 28, got ${v}$`));
    }
  });

  test('the mirrored signature, which names the same wallet, is refused', () => {
    const message = siweMessage(VECTOR_A.challenge, VECTOR_A.address);
    const digits = VECTOR_A.signature.slice(2);
    const mirrored = (CURVE_ORDER - BigInt(`0x${digits.slice(64, 128)}`)).toString(16).padStart(64, '0');
    const signature = `0x${digits.slice(0, 64)}${mirrored}1b`;
    // It is a valid signature to anyone who does not look for this.
    const bytes = Uint8Array.of(0, ...Buffer.from(digits.slice(0, 64) + mirrored, 'hex'));
    const publicKey = secp256k1.recoverPublicKey(bytes, messageDigest(message), { prehash: false });
    expect(hex(publicKey)).toBe(hex(secp256k1.getPublicKey(Buffer.from(VECTOR_A.key, 'hex'))));
    expect(refusal(() => recoverAddress(message, signature))).toMatch(/lower half/);
  });

  test('s at half of the order is accepted as low and one above it is refused', () => {
    const half = CURVE_ORDER / 2n;
    const signature = (s: bigint): string =>
      `${VECTOR_A.signature.slice(0, 66)}${s.toString(16).padStart(64, '0')}1b`;
    expect(recoverAddress('m', signature(half))).toMatch(/^0x[0-9a-f]{40}$/);
    expect(refusal(() => recoverAddress('m', signature(half + 1n)))).toMatch(/lower half/);
  });

  test('wrong lengths, no hex, and numbers no signature can have are refused', () => {
    const good = VECTOR_A.signature;
    for (const signature of ['', '0x', good.slice(0, -1), `${good}0`, `0x${'g'.repeat(130)}`, `${good}\n`]) {
      expect(refusal(() => recoverAddress('m', signature))).toMatch(/130 hex digits/);
    }
    const zero = '0'.repeat(64);
    const one = zero.replace(/0$/, '1');
    const order = CURVE_ORDER.toString(16);
    // 5 is the x of no point of this curve.
    const noPoint = zero.replace(/0$/, '5');
    for (const rs of [zero + one, one + zero, order + one, noPoint + one]) {
      expect(refusal(() => recoverAddress('m', `0x${rs}1b`))).toMatch(/any key can have made/);
    }
  });

  test('upper-case digits and a missing prefix are the same signature', () => {
    const message = siweMessage(VECTOR_A.challenge, VECTOR_A.address);
    expect(recoverAddress(message, VECTOR_A.signature.slice(2).toUpperCase())).toBe(VECTOR_A.address);
  });
});

describe('parseSiweMessage', () => {
  const base = siweMessage(VECTOR_A.challenge, VECTOR_A.address);
  const parsed = {
    ...VECTOR_A.challenge,
    address: VECTOR_A.address,
    statement: null,
    expirationTime: null,
    notBefore: null,
    requestId: null,
    resources: [],
  };

  test("the node's own message comes apart into what it was made of", () => {
    expect(parseSiweMessage(base)).toEqual(parsed);
  });

  test('any challenge of single lines survives the way there and back', () => {
    const word = fc.stringMatching(/^[!-~]([ -~]{0,30}[!-~])?$/);
    const challenge: fc.Arbitrary<SiweChallenge> = fc.record({
      domain: word,
      uri: word,
      version: word,
      chainId: fc.nat(),
      nonce: word,
      issuedAt: fc.constantFrom('2026-05-04T03:02:01Z', '2026-05-04T03:02:01.25+02:00'),
    });
    fc.assert(
      fc.property(challenge, (values) => {
        expect(parseSiweMessage(siweMessage(values, VECTOR_A.address))).toEqual({ ...parsed, ...values });
      }),
    );
  });

  test('CRLF, an address in any case, empty lines and a newline at the end are accepted', () => {
    const text = `${base
      .replace(VECTOR_A.address, ` ${VECTOR_A.address.replace(/[a-f]/g, (digit) => digit.toUpperCase())} `)
      .replace('\nNonce', '\n\n\nNonce')
      .replaceAll('\n', '\r\n')}\r\n`;
    expect(parseSiweMessage(text)).toEqual(parsed);
  });

  test('the strict layout of EIP-4361, with a statement and without, is accepted', () => {
    const withStatement = base.replace('\n\nURI', '\n\nI accept the terms.\n\nURI');
    expect(parseSiweMessage(withStatement)).toEqual({ ...parsed, statement: 'I accept the terms.' });
    expect(parseSiweMessage(base.replace('\n\nURI', '\n\n\nURI'))).toEqual(parsed);
  });

  test('a statement of two lines ends at the first known field', () => {
    const text = base.replace('\n\nURI', '\n\nfirst\nsecond\nURI');
    expect(parseSiweMessage(text)).toEqual({ ...parsed, statement: 'first\nsecond' });
  });

  test('optional fields and resources are read, in any order, and unknown fields are ignored', () => {
    const text = [
      base,
      'Request ID: 7',
      'Colour: blue',
      'Resources:',
      '- ipfs://a',
      '- https://b/c: d',
      'Not Before: 2026-05-04T03:02:01Z',
      'Expiration Time: 2026-05-04T04:02:01+01:00',
    ].join('\n');
    expect(parseSiweMessage(text)).toEqual({
      ...parsed,
      requestId: '7',
      notBefore: '2026-05-04T03:02:01Z',
      expirationTime: '2026-05-04T04:02:01+01:00',
      resources: ['ipfs://a', 'https://b/c: d'],
    });
  });

  test.each([
    ['five lines', base.split('\n').slice(0, 5).join('\n'), /at least 6 lines, got 5/],
    ['another first line', base.replace('Ethereum', 'Other'), /line 1 must end in/],
    ['an address of 39 digits', base.replace('914f1', '914f'), /line 2 must be an address/],
    ['an address of 41 digits', base.replace('914f1', '914f11'), /line 2 must be an address/],
    ['a third line that is not empty', base.replace('\n\nURI', '\nx\nURI'), /line 3 must be empty/],
    ['no URI', base.replace(/URI: .*\n/, '\n'), /URI is missing/],
    ['an empty nonce', base.replace('Zk3vQ9dL2mXa', ''), /Nonce is missing/],
    ['no version', base.replace('Version: 1\n', '\n'), /Version is missing/],
    ['no chain', base.replace('Chain ID: 8453\n', '\n'), /Chain ID is missing/],
    ['no issue time', base.replace(/Issued At.*/, ''), /Issued At is missing/],
    ['a chain that is no integer', base.replace('8453', '0x2105'), /Chain ID must be a decimal integer/],
    ['a chain past exact integers', base.replace('8453', '9007199254740993'), /Chain ID must be a decimal/],
    ['a date without time', base.replace('T03:02:01Z', ''), /Issued At must be an RFC 3339 time/],
    ['a time without offset', base.replace('01Z', '01'), /Issued At must be an RFC 3339 time/],
    ['a bad expiry', `${base}\nExpiration Time: soon`, /Expiration Time must be an RFC 3339 time/],
    ['a nonce given twice', `${base}\nNonce: other`, /Nonce must be given once/],
    ['a line that is no field', `${base}\nhello`, /line 9 must be "Key: value"/],
  ])('%s is refused by name', (_title, text, message) => {
    expect(refusal(() => parseSiweMessage(text))).toMatch(message);
  });

  test('any text is either taken apart or refused in words', () => {
    const line = fc.oneof(
      fc.constantFrom(...base.split('\n'), '', 'Resources:', '- a', ':', 'Nonce:'),
      fc.string({ maxLength: 20 }),
    );
    fc.assert(
      fc.property(fc.array(line, { maxLength: 14 }), (lines) => {
        try {
          expect(parseSiweMessage(lines.join('\n')).nonce).not.toBe('');
        } catch (error) {
          if (!MillraceError.is(error)) throw error;
          expect(error.code).toBe('invalid_argument');
        }
      }),
    );
  });
});
