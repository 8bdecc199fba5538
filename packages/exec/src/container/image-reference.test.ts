import { expect, test } from 'vitest';
import { imageMatches, parseImage } from './image-reference.ts';

const DIGEST = `sha256:${'ab'.repeat(32)}`;

test.each([
  ['debian', { name: 'debian', tag: null, digest: null }],
  ['debian:12', { name: 'debian', tag: '12', digest: null }],
  [
    'registry.example:5000/team/tool:v1.2',
    { name: 'registry.example:5000/team/tool', tag: 'v1.2', digest: null },
  ],
  [`tool@${DIGEST}`, { name: 'tool', tag: null, digest: DIGEST }],
  [`a/b__c/d-e:t@${DIGEST}`, { name: 'a/b__c/d-e', tag: 't', digest: DIGEST }],
  [DIGEST, { name: null, tag: null, digest: DIGEST }],
])('%s is an image', (text, parts) => {
  expect(parseImage(text, 'image')).toEqual({ text, ...parts });
});

test.each([
  'UPPER',
  'a b',
  '-a',
  'a/',
  '/a',
  'a:',
  'a@sha256:12',
  'a@md5:00',
  '../a',
  'a/../b',
  'http://a/b',
  'a\n',
  'a?b',
  'a:t#x',
  `a:${'t'.repeat(129)}`,
  'a'.repeat(513),
])('%j is no image', (text) => {
  expect(() => parseImage(text, 'meta.image')).toThrow(/^meta.image must be an image reference/);
});

test.each(['', '  ', null, 7])('%j is an empty image', (value) => {
  expect(() => parseImage(value, 'meta.image')).toThrow(/^meta.image: container image cannot be empty/);
});

test.each([
  ['debian:12', 'debian:12', true],
  ['debian:12', 'debian:123', false],
  ['debian:12', 'xdebian:12', false],
  ['debian:*', 'debian:12', true],
  ['debian:*', 'debian', false],
  ['registry.example/*', 'registry.example/tool:1', true],
  ['registry.example/*', 'registry.example/team/tool:1', false],
  ['registry.example/**', 'registry.example/team/tool:1', true],
  ['registry.example/**', 'registryxexample/team/tool:1', false],
  ['**', 'anything/at:all', true],
  [`tool@${DIGEST}`, `tool@${DIGEST}`, true],
])('the pattern %s on %s: %j', (pattern, image, allowed) => {
  expect(imageMatches(pattern, parseImage(image, 'image'))).toBe(allowed);
});
