import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { MAX_RESOURCES, formatResources, parseResourceList, parseResources } from './resources.ts';

function refused(read: () => unknown): string {
  try {
    read();
  } catch (error) {
    const { code, message, details } = MillraceError.from(error);
    expect(code).toBe('invalid_argument');
    return `${(details['name'] as string | undefined) ?? ''}: ${message}`;
  }
  return 'accepted';
}

describe('amounts of resources', () => {
  test('they are numbers by name, in the order of the names', () => {
    const parsed = parseResources({ gpu: 1, cpu: 0.25, 'acme.com/license_1-x': 3 });
    expect(parsed).toEqual({ cpu: 0.25, gpu: 1, 'acme.com/license_1-x': 3 });
    expect(JSON.stringify(parsed)).toBe('{"acme.com/license_1-x":3,"cpu":0.25,"gpu":1}');
  });

  test('memory may be a size', () => {
    for (const [text, bytes] of [
      ['512MiB', 512 * 1024 ** 2],
      ['1.5 GB', 1.5e9],
      ['8TiB', 8 * 1024 ** 4],
      ['1B', 1],
      ['0.5KiB', 512],
    ] as const) {
      expect(parseResources({ memory: text })).toEqual({ memory: bytes });
    }
    for (const memory of ['512', '512 mib', '-1MiB', '1.2345KiB', '', 'MiB', '0.0001B', '1.5B']) {
      expect(refused(() => parseResources({ memory }))).toContain('memory: must be a whole number of bytes');
    }
    expect(refused(() => parseResources({ cpu: '2' }))).toContain('cpu: must be a multiple of 0.001');
  });

  test('nothing, null and an empty object are none', () => {
    for (const value of [undefined, null, {}]) expect(parseResources(value)).toBeNull();
  });

  test('every bound holds at it, and is told of one past it', () => {
    expect(parseResources({ cpu: 0.001, x: 2 ** 53, ['a'.repeat(63)]: 1 })).not.toBeNull();
    for (const cpu of [0, -1, 0.0005, 2 ** 53 + 2, Number.NaN, Infinity, true, [1]]) {
      expect(refused(() => parseResources({ cpu }))).toContain('cpu: must be a multiple of 0.001, above 0');
    }
    for (const gpu of [0, 0.5, 2 ** 53 + 2]) {
      expect(refused(() => parseResources({ gpu }))).toBe('gpu: must be a whole number from 1 to 2^53');
    }
    for (const name of ['a'.repeat(64), 'CPU', '1a', '', 'a b', '.a', 'ä']) {
      expect(refused(() => parseResources({ [name]: 1 }))).toContain(`${name}: is no name of a resource`);
    }
    const many = (count: number): object =>
      Object.fromEntries(Array.from({ length: count }, (_, index) => [`r${index}`, 1]));
    expect(Object.keys(parseResources(many(MAX_RESOURCES)) ?? {})).toHaveLength(MAX_RESOURCES);
    for (const value of [many(MAX_RESOURCES + 1), [], 'cpu', 7]) {
      expect(refused(() => parseResources(value))).toContain(
        'must be an object of 1 to 16 names and amounts',
      );
    }
  });

  test('on one line they are a list, which is how they are shown', () => {
    const parsed = parseResourceList(' cpu=8, memory = 1.5 GiB ,gpu=1');
    expect(parsed).toEqual({ cpu: 8, memory: 1.5 * 1024 ** 3, gpu: 1 });
    expect(parseResourceList(formatResources(parsed ?? {}))).toEqual(parsed);
    expect(parseResourceList(' ')).toBeNull();
    expect(refused(() => parseResourceList('cpu=1,,gpu=1'))).toContain('has the part ""');
    expect(refused(() => parseResourceList('cpu'))).toContain('such as cpu=8,memory=32GiB,gpu=1');
    expect(refused(() => parseResourceList('cpu=1,cpu=2'))).toBe('cpu: is named twice');
    expect(refused(() => parseResourceList('cpu=many'))).toContain('cpu: must be a multiple');
  });
});
