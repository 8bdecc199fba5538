import { describe, expect, test } from 'vitest';
import { zip } from './image.test.support.ts';
import { ZipArchive, isZip } from './zip.ts';

const LIMIT = 1_000_000;
const text = Buffer.from('the mill, '.repeat(100));
const archive = (bytes: Buffer): ZipArchive => new ZipArchive(bytes, 10);

describe('an archive', () => {
  test('is read whether stored or deflated, with a comment behind it', () => {
    const bytes = zip(
      [
        { name: 'a.txt', content: text },
        { name: 'sub/', content: Buffer.alloc(0), stored: true },
        { name: 'sub/ä', content: text, stored: true },
        { name: 'empty', content: Buffer.alloc(0) },
      ],
      'made by hand',
    );
    expect(isZip(bytes)).toBe(true);
    const read = archive(bytes);
    expect(read.names).toEqual(['a.txt', 'sub/ä', 'empty']);
    for (const name of ['a.txt', 'sub/ä']) expect(read.read(name, LIMIT)).toEqual(text);
    expect(read.read('empty', LIMIT)).toEqual(Buffer.alloc(0));
    expect(read.read('absent', LIMIT)).toBeNull();
  });

  test('gives a file of the limit and refuses one of a byte more, whatever the directory says', () => {
    const read = archive(zip([{ name: 'a', content: text }]));
    expect(read.read('a', text.length)).toEqual(text);
    expect(() => read.read('a', text.length - 1)).toThrow(
      `has ${text.length} bytes, over the limit of ${text.length - 1}`,
    );
    const lying = archive(zip([{ name: 'a', content: Buffer.alloc(10_000_000), bytes: 10 }]));
    expect(() => lying.read('a', LIMIT)).toThrow('cannot be unpacked');
  });

  test('has as many entries as the limit and no more', () => {
    const members = Array.from({ length: 11 }, (_, index) => ({ name: String(index), content: text }));
    expect(archive(zip(members.slice(1))).names).toHaveLength(10);
    expect(() => archive(zip(members))).toThrow('has 11 entries, over the limit of 10');
  });

  test.each([
    ['a checksum that is not its content', { crc: 1 }, 'does not fit its checksum'],
    ['a size that is not its content', { bytes: 1001 }, 'does not fit its checksum'],
    ['encrypted content', { flags: 1 }, 'encrypted'],
    ['another way of packing', { method: 12 }, 'packed by method 12'],
  ])('with %s is refused', (_name, told, message) => {
    const read = archive(zip([{ name: 'a', content: text, ...told }]));
    expect(() => read.read('a', LIMIT)).toThrow(message);
  });

  test('with two files of one name is refused', () => {
    expect(() => archive(zip(['a', 'a'].map((name) => ({ name, content: text }))))).toThrow(
      'holds "a" twice',
    );
  });

  test('cut or changed anywhere is refused or read right, never anything else', () => {
    const bytes = zip([
      { name: 'a', content: text },
      { name: 'b', content: text, stored: true },
    ]);
    const attempt = (changed: Buffer): void => {
      try {
        const read = archive(changed);
        for (const name of read.names) expect(read.read(name, LIMIT)?.equals(text)).toBe(true);
      } catch (error) {
        expect(error).toMatchObject({
          code: expect.stringMatching(/invalid_argument|data_loss|resource_exhausted/),
        });
      }
    };
    for (let at = 0; at < bytes.length; at += 1) {
      attempt(bytes.subarray(0, at));
      const changed = Buffer.from(bytes);
      changed[at] = changed[at]! ^ 0xff;
      attempt(changed);
    }
  });

  test('is told from other files', () => {
    expect(isZip(Buffer.from('\0asm\x01\0\0\0', 'latin1'))).toBe(false);
    expect(isZip(Buffer.alloc(0))).toBe(false);
    expect(() => archive(Buffer.from('PK'))).toThrow('no directory at its end');
  });
});
