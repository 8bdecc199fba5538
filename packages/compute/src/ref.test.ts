import { describe, expect, test } from 'vitest';
import { checkRef, formatRef, parseRef, requireRef, scanRefs, storeRef } from './ref.ts';

describe('parseRef', () => {
  test.each([
    ['compute://sha256/abc123', 'sha256', 'abc123'],
    ['compute://blake3/deadbeef', 'blake3', 'deadbeef'],
    ['compute://SHA256/ABC', 'SHA256', 'ABC'],
    ['compute://sha256/abc/def', 'sha256', 'abc/def'],
    ['compute://sha256/../../etc', 'sha256', '../../etc'],
    ['compute://sha256//', 'sha256', '/'],
    ['compute://sha256/?x=1', 'sha256', '?x=1'],
    ['compute://sha256/abc#frag', 'sha256', 'abc#frag'],
    ['compute://sha256/abc ', 'sha256', 'abc '],
    ['compute://a b/c', 'a b', 'c'],
  ])('takes %j apart, and the parts give it back', (text, alg, digest) => {
    const ref = parseRef(text);
    expect(ref).toEqual({ alg, digest });
    expect(formatRef(ref!)).toBe(text);
  });

  test.each([
    'compute://sha256/',
    'compute://sha256',
    'compute:///abc',
    'compute://',
    'Compute://sha256/abc',
    ' compute://sha256/abc',
    'compute:/sha256/abc',
    'op://x',
    'http://sha256/abc',
    '',
  ])('gives null for %j', (text) => {
    expect(parseRef(text)).toBeNull();
  });
});

describe('scanRefs', () => {
  const found = (text: string): string[] => scanRefs(text).map((ref) => `${ref.alg}/${ref.digest}`);

  test.each([
    [
      'EXEC "compute://sha256/aa" WITH x="compute://sha256/bb" EXEC "compute://sha256/aa"',
      ['sha256/aa', 'sha256/bb'],
    ],
    ['# "compute://sha256/commented"', ['sha256/commented']],
    ['EXEC "compute://sha256/A_b-9"', ['sha256/A_b-9']],
    ['"compute://blake3/zz" "compute://sha256/zz"', ['blake3/zz', 'sha256/zz']],
  ])('finds the distinct refs of %j, first ones first', (text, refs) => {
    expect(found(text)).toEqual(refs);
  });

  test.each([
    "EXEC 'compute://sha256/aa'",
    'EXEC compute://sha256/aa',
    'EXEC "compute://SHA256/aa"',
    'EXEC "compute://sha-256/aa"',
    'EXEC "compute://sha256/aa/bb"',
    'EXEC "compute://sha256/aa.bb"',
    'EXEC "compute://sha256/aa "',
    'EXEC "op://x"',
    '',
  ])('finds none in %j', (text) => {
    expect(found(text)).toEqual([]);
  });
});

test('the store key is the algorithm and the digest under computes', () => {
  expect(storeRef({ alg: 'sha256', digest: 'ab' })).toBe('computes/sha256/ab');
});

describe('a ref that bytes are fetched for', () => {
  const digest = '0123456789abcdef'.repeat(4);

  test('is sha256 with 64 lower-case hex digits', () => {
    checkRef({ alg: 'sha256', digest });
    expect(requireRef(`compute://sha256/${digest}`)).toEqual({ alg: 'sha256', digest });
  });

  test.each([
    ['compute://sha512/ab', /algorithm "sha512"/],
    [`compute://sha256/${digest.slice(1)}`, /64 lower-case hex digits/],
    [`compute://sha256/${digest}0`, /64 lower-case hex digits/],
    [`compute://sha256/${digest.toUpperCase()}`, /64 lower-case hex digits/],
    ['compute://sha256/../../etc/passwd', /64 lower-case hex digits/],
    ['sha256:abc', /malformed compute ref "sha256:abc"; want compute:\/\/<alg>\/<digest>/],
  ])('%s is refused', (text, message) => {
    expect(() => requireRef(text)).toThrow(
      expect.objectContaining({
        code: 'invalid_argument',
        message: expect.stringMatching(message) as string,
        details: { reason: 'bad-ref' },
      }),
    );
  });
});
