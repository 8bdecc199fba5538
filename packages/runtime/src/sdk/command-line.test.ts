import { describe, expect, test } from 'vitest';
import { UsageError, checkDeclaration, parseCommandLine, type CliDeclaration } from './command-line.ts';

const DECLARATION: CliDeclaration = {
  options: {
    loud: { type: 'boolean', short: 'l' },
    level: { type: 'number', default: 1 },
    tag: { type: 'string', multiple: true },
  },
  positionals: [{ name: 'profile' }],
};

describe('a command line', () => {
  test.each([
    [['--nope', 'test'], 'unknown option --nope'],
    [['-w', 'a', '-w', 'b', 'deploy'], 'option -w was given twice'],
    [['--cpu-cores', 'many', 'test'], 'option --cpu-cores must be a number, got "many"'],
    [['--mem-gib', '', 'test'], 'must be a number'],
    [['--cpu-cores', '1.5', 'test'], 'option --cpu-cores must be a whole number from 0, got "1.5"'],
    [['--cpu-cores=-1', 'test'], 'option --cpu-cores must be a whole number from 0, got "-1"'],
    [['--mem-gib', '-0.5', 'test'], 'option --mem-gib must be a number from 0, got "-0.5"'],
    [['--storage-gib', '-1', 'test'], 'option --storage-gib must be a number from 0, got "-1"'],
    [['--vpn-endpoint', '41234', 'test'], 'option --vpn-endpoint must be a URL such as udp://'],
    [['--inet-endpoint', 'udp://', 'test'], 'option --inet-endpoint must be a URL such as udp://'],
    [['--volume-override', '{', 'test'], 'must be JSON'],
    [['--volume-override', '{"/a":{"tape":{}}}', 'test'], '/a must be'],
    [['--loud=yes', 'test'], 'takes no value'],
    [['deploy'], 'option --workdir is required for deploy'],
    [['start'], 'option --workdir is required for start'],
    [['run', 'x'], 'option --workdir is required for run'],
    [['-w', 'a', 'deploy', '--hostname', 'h'], 'options come before the subcommand'],
    [['-w', 'a', 'run'], 'run: not enough arguments'],
    [['-w', 'a', 'run', '--entrypoint'], 'option --entrypoint needs a value'],
    [['-w', 'a', 'run', '-e', 'a', '-e', 'b'], 'given twice'],
    [['-w'], 'option -w needs a value'],
    [['p', 'q', 'test'], 'unknown subcommand "q"'],
    [[], 'a subcommand is missing'],
    [['test', 'x'], 'test takes no words'],
  ])('%j is refused', (args, message) => {
    const parse = () => parseCommandLine(DECLARATION, args);
    expect(parse).toThrow(UsageError);
    expect(parse).toThrow(message);
  });

  test('may glue a value to a short option, or put = between', () => {
    for (const words of [['-w', 'dir'], ['-wdir'], ['-w=dir'], ['--workdir=dir'], ['--workdir', 'dir']]) {
      expect(parseCommandLine({}, [...words, 'deploy'])).toMatchObject({ cli: { workdir: 'dir' } });
    }
  });

  test('reads a word that names a subcommand as the subcommand', () => {
    expect(parseCommandLine(DECLARATION, ['test'])).toMatchObject({
      cli: { command: { name: 'test' }, positionals: { profile: null } },
    });
  });

  test('of start keeps every word, with or without a -- before them', () => {
    for (const words of [
      ['--x', '-y', '--'],
      ['--', '--x', '-y', '--'],
    ]) {
      expect(parseCommandLine({}, ['-w', 'd', 'start', ...words])).toMatchObject({
        cli: { command: { name: 'start', args: ['--x', '-y', '--'] } },
      });
    }
  });

  test('asks for what is declared as required', () => {
    const declaration: CliDeclaration = {
      options: { key: { type: 'string', required: true } },
      positionals: [{ name: 'profile', required: true }],
    };
    expect(() => parseCommandLine(declaration, ['--key', 'k', 'test'])).toThrow(
      'profile is missing before test',
    );
    expect(() => parseCommandLine(declaration, ['p', 'test'])).toThrow('option --key is required');
  });
});

describe('a declaration', () => {
  test.each([
    [{ workdir: { type: 'string' } }, '--workdir is a standard option'],
    [{ Loud: { type: 'boolean' } }, 'must match'],
    [{ loud: { type: 'boolean', short: 'w' } }, 'must be one free letter'],
    [{ a: { type: 'boolean', short: 'x' }, b: { type: 'boolean', short: 'x' } }, 'must be one free letter'],
  ] as const)('%j is refused', (options, message) => {
    expect(() => checkDeclaration({ options })).toThrow(message);
  });
});
