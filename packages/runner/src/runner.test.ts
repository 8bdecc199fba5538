import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { MAX_CAPABILITY_BYTES, checkCapability, defineRunner } from './runner.ts';
import { materializedInput } from './materialized-input.ts';

const run = async (): Promise<void> => {};

describe('defineRunner', () => {
  test('returns the definition itself', () => {
    const definition = { capability: '/examples/hello/v1', run, close: run };
    expect(defineRunner(definition)).toBe(definition);
  });

  test('keeps a class instance whose methods are on its prototype', () => {
    class Counter {
      readonly capability = '/examples/count/v1';
      runs = 0;
      async run(): Promise<void> {
        this.runs += 1;
      }
    }
    expect(defineRunner(new Counter())).toBeInstanceOf(Counter);
  });

  test.each([
    [undefined, 'defineRunner takes an object, got undefined'],
    [null, 'defineRunner takes an object, got null'],
    [run, 'defineRunner takes an object, got function'],
    [{ run }, 'capability must be a non-empty string, got undefined'],
    [{ capability: 7, run }, 'capability must be a non-empty string, got number'],
    [{ capability: '/a' }, 'runner /a: run must be a function, got undefined'],
    [{ capability: '/a', run: {} }, 'runner /a: run must be a function, got object'],
    [{ capability: '/a', run, close: true }, 'runner /a: close must be a function or absent, got boolean'],
    [
      { capability: '/a', run, onNodeStart: null },
      'runner /a: onNodeStart must be a function or absent, got null',
    ],
  ])('refuses %s', (definition, message) => {
    expect(() => defineRunner(definition as never)).toThrow(
      expect.objectContaining({ code: 'invalid_argument', message }),
    );
  });
});

describe('checkCapability', () => {
  test.each(['a', '/examples/hello/v1', 'auki/x', 'größe', '🗺', 'a'.repeat(MAX_CAPABILITY_BYTES)])(
    'takes %s',
    (capability) => {
      checkCapability(capability);
    },
  );

  test.each([
    '',
    ' ',
    '/a b',
    '/a\n',
    '/a\u0000',
    '/a\u007f',
    '/a\u0085',
    '/a\u00a0',
    '/a\ud800',
    7,
    null,
    {},
  ])('refuses %j', (value) => {
    expect(() => checkCapability(value)).toThrow(expect.objectContaining({ code: 'invalid_argument' }));
  });

  test('counts bytes, not characters', () => {
    checkCapability('ä'.repeat(MAX_CAPABILITY_BYTES / 2));
    expect(() => checkCapability('a'.repeat(MAX_CAPABILITY_BYTES + 1))).toThrow(/at most 256 bytes, got 257/);
    expect(() => checkCapability(`a${'ä'.repeat(MAX_CAPABILITY_BYTES / 2)}`)).toThrow(/got 257/);
  });
});

test('a materialised input made from a CID and a path has that folder as its root, and no metadata', () => {
  expect(materializedInput('cid', join('/tmp', 'x', 'file.bin'))).toEqual({
    cid: 'cid',
    path: join('/tmp', 'x', 'file.bin'),
    data_id: null,
    name: null,
    data_type: null,
    domain_id: null,
    root_dir: join('/tmp', 'x'),
    related_files: [],
    extracted_paths: [],
  });
  expect(materializedInput('cid', '/').root_dir).toBe('/');
});
