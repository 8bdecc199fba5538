import { describe, expect, test } from 'vitest';
import type { JsonObject } from '@millrace/runner';
import { checkMetaValues, fillArguments, parseArguments } from './arguments.ts';

const VALUES = {
  inputs: new Map([
    ['a', '/t/in/a'],
    ['b c', '/t/in/b c'],
  ]),
  outputDir: '/t/out',
  workDir: '/t/work',
  meta: {
    size: 7,
    name: 'x y; rm -rf "$HOME"',
    on: true,
    list: [1],
    zero: 0,
    minus: -5,
    option: '-delete',
  } as JsonObject,
};

function filled(...args: string[]): string[] {
  return fillArguments(parseArguments('args', args, 'refuse'), VALUES);
}

describe('placeholders', () => {
  test.each<[string, string[]]>([
    ['plain', ['plain']],
    ['', ['']],
    ['{input:a}', ['/t/in/a']],
    ['{input:b c}', ['/t/in/b c']],
    ['{inputs}', ['/t/in/a', '/t/in/b c']],
    ['{outdir}', ['/t/out']],
    ['{workdir}', ['/t/work']],
    ['{output:maps/x.png}', ['/t/out/maps/x.png']],
    ['png:{output:x}', ['png:/t/out/x']],
    ['{meta:size}x{meta:size}', ['7x7']],
    ['{meta:on}', ['true']],
    ['{meta:zero}', ['0']],
    ['{meta:none=8}', ['8']],
    ['{meta:none=}', ['']],
    ['{meta:size=8}', ['7']],
    ['{meta:minus}', ['-5']],
    ['--name={meta:option}', ['--name=-delete']],
    ['{meta:name}', ['x y; rm -rf "$HOME"']],
    ['{{outdir}}', ['{outdir}']],
    ['{{meta:size}}', ['{meta:size}']],
    ['{ print $1 }', ['{ print $1 }']],
    ['${x} {X} {1,3}', ['${x} {X} {1,3}'].map((text) => text)],
  ])('%j becomes %j', (arg, expected) => {
    if (arg.includes('${x}')) {
      expect(() => filled(arg)).toThrow(/\{x\} is no placeholder/);
      expect(fillArguments(parseArguments('args', [arg], 'text'), VALUES)).toEqual(expected);
    } else expect(filled(arg)).toEqual(expected);
  });

  test.each<[string, RegExp]>([
    ['{input:z}', /the command needs an input named "z"; inputs of this task: a, b c/],
    ['{meta:none}', /^meta\.none is missing/],
    ['{meta:list}', /^meta\.list must be a string, number or boolean, got an array/],
    ['{meta:option}', /^meta\.option must not begin with "-"/],
    ['{output:../x}', /args\[0\]: output "\.\.\/x" must not have/],
    ['{output:/x}', /must not be absolute/],
    ['x{inputs}', /args\[0\]: \{inputs\} stands for several arguments/],
    ['{outdir:x}', /\{outdir:x\} is no placeholder/],
    ['a\0b', /args\[0\] must not contain a NUL/],
  ])('%j is refused', (arg, message) => {
    expect(() => filled(arg)).toThrow(message);
  });

  test('a task’s own arguments keep braces that are no placeholders', () => {
    const args = parseArguments('meta.args', ['{print}', '{{print}}', '{{outdir}}', '{outdir}'], 'text');
    expect(fillArguments(args, VALUES)).toEqual(['{print}', '{{print}}', '{outdir}', '/t/out']);
  });

  test('a value is at most 32 KiB long', () => {
    const args = parseArguments('args', ['{meta:v}'], 'refuse');
    checkMetaValues(args, { v: 'x'.repeat(32 * 1024) });
    expect(() => checkMetaValues(args, { v: 'x'.repeat(32 * 1024 + 1) })).toThrow(
      /at most 32768 bytes long, it has 32769/,
    );
  });
});
