/** Programs with grants: what they may do, and every way out that was thought of. */
import { mkdir, mkdtemp, readFile, readdir, rm, symlink, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { engineNames } from '../engine.ts';
import { computeReason } from '../errors.ts';
import { program, wat, type ProgramParts } from '../fixtures/wat.ts';
import { ERRNO } from './errno.ts';
import { WasiCommands, type WasiCommandLimits, type WasiGrants } from './wasi-commands.ts';

let commands: WasiCommands;
let dir: string;
beforeAll(() => {
  commands = new WasiCommands({ maxWallMs: 20_000 }, { workers: 2 });
});
afterAll(() => commands.close());
beforeEach(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-wasi-'));
  await mkdir(path.join(dir, 'in'));
  await mkdir(path.join(dir, 'out'));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const mounts = (): NonNullable<WasiGrants['mounts']> => [
  { guestPath: '/in', hostPath: path.join(dir, 'in') },
  { guestPath: '/out', hostPath: path.join(dir, 'out'), writable: true },
];
/** Descriptors of the two. */
const IN = 3;
const OUT = 4;

interface Outcome {
  readonly exitCode: number;
  readonly trap: string | null;
  readonly stdout: string;
  readonly stderr: string;
}

async function run(wasm: Uint8Array, grants: WasiGrants = {}, by = commands): Promise<Outcome> {
  const heard = { stdout: '', stderr: '' };
  const { exitCode, trap } = await by.run(wasm, {
    mounts: mounts(),
    onOutput: (stream, bytes) => (heard[stream] += Buffer.from(bytes).toString()),
    ...grants,
  });
  return { exitCode, trap: trap?.message ?? null, ...heard };
}

/** Runs with limits of its own. */
async function runLimited(limits: Partial<WasiCommandLimits>, wasm: Uint8Array): Promise<Outcome> {
  await using limited = new WasiCommands(limits, { workers: 1 });
  return await run(wasm, {}, limited);
}

const FUNCTIONS = [
  'args_sizes_get',
  'args_get',
  'environ_sizes_get',
  'environ_get',
  'fd_close',
  'fd_filestat_get',
  'fd_filestat_set_size',
  'fd_prestat_get',
  'fd_prestat_dir_name',
  'fd_pread',
  'fd_readdir',
  'fd_renumber',
  'fd_seek',
  'fd_fdstat_get',
  'path_create_directory',
  'path_filestat_get',
  'path_filestat_set_times',
  'path_link',
  'path_open',
  'path_readlink',
  'path_remove_directory',
  'path_rename',
  'path_symlink',
  'path_unlink_file',
  'poll_oneoff',
  'proc_exit',
];

/** Texts the program can name as `$texts` says: `[pointer, length]` of each, from 1024 on. */
function withTexts(
  texts: readonly string[],
  body: (at: (text: string) => string) => string,
  parts: ProgramParts = {},
): Uint8Array {
  const places = new Map<string, string>();
  let at = 1024;
  const data = texts.map((text) => {
    const bytes = Buffer.from(text);
    places.set(text, `(i32.const ${at}) (i32.const ${bytes.length})`);
    const field = `(data (i32.const ${at}) "${[...bytes].map((byte) => `\\${byte.toString(16).padStart(2, '0')}`).join('')}")`;
    at += bytes.length + 8;
    return field;
  });
  return program(
    body((text) => places.get(text)!),
    { wasi: FUNCTIONS, ...parts, fields: `${data.join('\n')} ${parts.fields ?? ''}` },
  );
}

/** Prints a number and a blank: byte 60 is made one. */
const say = (expression: string): string =>
  `(call $num ${expression}) (i32.store8 (i32.const 60) (i32.const 32)) (call $write (i32.const 1) (i32.const 60) (i32.const 1))`;
/** Opens a path and leaves the errno; the descriptor is at 512. Rights: 2 read, 64 write. */
const open = (fd: number, text: string, flags = 0, rights = 2 | 64): string =>
  `(call $path_open (i32.const ${fd}) (i32.const 1) ${text} (i32.const ${flags}) (i64.const ${rights}) (i64.const 0) (i32.const 0) (i32.const 512))`;
const opened = '(i32.load (i32.const 512))';
const CREAT = 1;
const TRUNC = 8;
/** Writes `length` bytes of the memory from 1024 on; leaves the errno. */
const write = (length: number, fd = opened): string =>
  `(block (result i32) (i32.store (i32.const 520) (i32.const 1024)) (i32.store (i32.const 524) (i32.const ${length}))
    (call $fd_write ${fd} (i32.const 520) (i32.const 1) (i32.const 528)))`;

async function numbers(wasm: Uint8Array, grants: WasiGrants = {}, by = commands): Promise<number[]> {
  const { exitCode, trap, stdout } = await run(wasm, grants, by);
  expect([exitCode, trap]).toEqual([0, null]);
  return stdout.trim().split(/\s+/).map(Number);
}

describe('a program', () => {
  test('has its arguments and variables, and nothing else of the environment', async () => {
    const dump = program(
      `(drop (call $args_sizes_get (i32.const 100) (i32.const 104)))
       (drop (call $args_get (i32.const 200) (i32.const 1000)))
       (call $write (i32.const 1) (i32.const 1000) (i32.load (i32.const 104)))
       (drop (call $environ_sizes_get (i32.const 100) (i32.const 104)))
       (drop (call $environ_get (i32.const 200) (i32.const 2000)))
       (call $write (i32.const 2) (i32.const 2000) (i32.load (i32.const 104)))`,
      { wasi: FUNCTIONS },
    );
    const { stdout, stderr } = await run(dump, {
      args: ['tool', '', 'ä b'],
      env: { HOME: '/out', EMPTY: '' },
    });
    expect(stdout).toBe('tool\0\0ä b\0');
    expect(stderr).toBe('HOME=/out\0EMPTY=\0');
    expect(await run(dump, {})).toMatchObject({ stdout: 'program\0', stderr: '' });
    await expect(run(dump, { args: ['a\0b'] })).rejects.toMatchObject({ code: 'invalid_argument' });
  });

  test('ends with its exit code, all 32 bits of it', async () => {
    const exit = (code: number): Uint8Array =>
      program(`(call $proc_exit (i32.const ${code}))`, { wasi: ['proc_exit'] });
    expect((await run(exit(0))).exitCode).toBe(0);
    expect((await run(exit(3))).exitCode).toBe(3);
    expect((await run(exit(-1))).exitCode).toBe(2 ** 32 - 1);
  });

  test('that traps ends with 134 and what it trapped with, its output kept', async () => {
    const outcome = await run(program('(call $num (i32.const 7)) unreachable'));
    expect(outcome).toMatchObject({ exitCode: 134, trap: 'unreachable', stdout: '7' });
  });

  test('has its output heard while it runs', async () => {
    const stop = new AbortController();
    const reason = new Error('heard enough');
    const endless = program('(call $num (i32.const 1)) (loop $l (br $l))');
    const heard = run(endless, { signal: stop.signal, onOutput: () => stop.abort(reason) });
    await expect(heard).rejects.toBe(reason);
  });

  test('sleeps when it sleeps, and is killed in its sleep', async () => {
    const sleep = (ns: string): Uint8Array =>
      program(
        `(i64.store (i32.const 1024) (i64.const 9)) (i32.store (i32.const 1040) (i32.const 1))
         (i64.store (i32.const 1048) (i64.const ${ns}))
         (call $num (i32.const 1))
         (call $num (call $poll_oneoff (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 3072)))`,
        { wasi: ['poll_oneoff'] },
      );
    const begun = performance.now();
    expect((await run(sleep('200000000'))).stdout).toBe('10');
    expect(performance.now() - begun).toBeGreaterThan(190);
    const stop = new AbortController();
    const asleep = run(sleep('3600000000000'), {
      signal: stop.signal,
      onOutput: () => stop.abort(new Error('wake up')),
    });
    await expect(asleep).rejects.toThrow('wake up');
  });

  test('is refused with grants that are none', async () => {
    const nothing = program('');
    const grant = (guestPath: string, hostPath: string): WasiGrants => ({
      mounts: [{ guestPath, hostPath }],
    });
    await writeFile(path.join(dir, 'file'), '');
    await expect(run(nothing, grant('in', dir))).rejects.toThrow('must start with /');
    await expect(run(nothing, grant('/in', path.join(dir, 'absent')))).rejects.toMatchObject({
      code: 'not_found',
    });
    await expect(run(nothing, grant('/in', path.join(dir, 'file')))).rejects.toThrow('is no folder');
    const aborted = AbortSignal.abort(new Error('too late'));
    await expect(run(nothing, { signal: aborted })).rejects.toThrow('too late');
  });

  test('cannot be reached as an engine, where others name what runs', () => {
    expect(engineNames()).not.toContain('wasi');
  });

  test('is checked without being run', () => {
    commands.check(program('unreachable'));
    expect(() => commands.check(Buffer.from('no module'))).toThrow('module refused');
    expect(() => commands.check(wat('(module (func (export "main")))'))).toThrow('no function _start');
    const own = new WasiCommands({ maxModuleBytes: 8 });
    expect(() => own.check(program(''))).toThrow('over maxModuleBytes 8');
  });
});

describe('granted folders', () => {
  test('are told as what they are called', async () => {
    const wasm = program(
      `${say('(call $fd_prestat_get (i32.const 3) (i32.const 100))')} ${say('(i32.load (i32.const 104))')}
       ${say('(call $fd_prestat_dir_name (i32.const 4) (i32.const 200) (i32.const 4))')}
       ${say('(call $fd_prestat_dir_name (i32.const 4) (i32.const 200) (i32.const 3))')}
       ${say('(call $fd_prestat_get (i32.const 5) (i32.const 100))')}
       ${say('(call $fd_prestat_get (i32.const 1) (i32.const 100))')}
       (call $write (i32.const 2) (i32.const 200) (i32.const 4))`,
      { wasi: FUNCTIONS },
    );
    const { stdout, stderr } = await run(wasm);
    expect(stdout.trim().split(' ').map(Number)).toEqual([
      0,
      3,
      0,
      ERRNO.nametoolong,
      ERRNO.badf,
      ERRNO.badf,
    ]);
    expect(stderr).toBe('/out');
  });

  test('are read and written', async () => {
    await writeFile(path.join(dir, 'in', 'a'), 'hello');
    const wasm = withTexts(['a', 'sub', 'sub/b'], (at) =>
      [
        say(open(IN, at('a'), 0, 2)),
        // Read at 2000, position by position.
        `(i32.store (i32.const 540) (i32.const 2000)) (i32.store (i32.const 544) (i32.const 3))`,
        say(`(call $fd_read ${opened} (i32.const 540) (i32.const 1) (i32.const 548))`),
        say(`(call $fd_seek ${opened} (i64.const -1) (i32.const 2) (i32.const 552))`),
        `(i32.store (i32.const 540) (i32.const 2003))`,
        say(`(call $fd_read ${opened} (i32.const 540) (i32.const 1) (i32.const 548))`),
        say(`(call $fd_close ${opened})`),
        say(`(call $path_create_directory (i32.const ${OUT}) ${at('sub')})`),
        say(open(OUT, at('sub/b'), CREAT)),
        `(i32.store (i32.const 540) (i32.const 2000)) (i32.store (i32.const 544) (i32.const 4))`,
        say(`(call $fd_write ${opened} (i32.const 540) (i32.const 1) (i32.const 548))`),
      ].join('\n'),
    );
    expect(await numbers(wasm)).toEqual([0, 0, 0, 0, 0, 0, 0, 0]);
    expect(await readFile(path.join(dir, 'out', 'sub', 'b'), 'utf8')).toBe('helo');
  });

  test('are not written where that is not granted', async () => {
    await writeFile(path.join(dir, 'in', 'a'), 'hello');
    const wasm = withTexts(['a', 'new', 'b'], (at) =>
      [
        open(IN, at('a'), 0, 64),
        open(IN, at('a'), TRUNC, 2),
        open(IN, at('new'), CREAT, 2),
        `(call $path_create_directory (i32.const ${IN}) ${at('new')})`,
        `(call $path_unlink_file (i32.const ${IN}) ${at('a')})`,
        `(call $path_rename (i32.const ${IN}) ${at('a')} (i32.const ${OUT}) ${at('b')})`,
        `(call $path_filestat_set_times (i32.const ${IN}) (i32.const 0) ${at('a')} (i64.const 0) (i64.const 0) (i32.const 5))`,
      ]
        .map(say)
        .join('\n'),
    );
    expect(await numbers(wasm)).toEqual(Array.from({ length: 7 }, () => ERRNO.rofs));
    expect(await readdir(path.join(dir, 'in'))).toEqual(['a']);
    expect(await readFile(path.join(dir, 'in', 'a'), 'utf8')).toBe('hello');
  });

  test('cannot be left by any path', async () => {
    await writeFile(path.join(dir, 'secret'), 'secret');
    await mkdir(path.join(dir, 'out', 'sub'));
    const paths = ['../secret', '/etc/passwd', 'sub/../../secret', '..', './/../out', 'sub/../..'];
    const wasm = withTexts([...paths, 'sub', '../sub'], (at) =>
      [
        ...paths.map((one) => say(open(OUT, at(one), 0, 2))),
        ...paths.map((one) =>
          say(`(call $path_filestat_get (i32.const ${OUT}) (i32.const 1) ${at(one)} (i32.const 2000))`),
        ),
        // A folder that was opened is a wall, too, although the granted one goes further up.
        say(open(OUT, at('sub'), 2, 2)),
        say(open(5, at('../sub'), 0, 2)),
      ].join('\n'),
    );
    const outcomes = await numbers(wasm);
    expect(outcomes.slice(0, 12)).toEqual(Array.from({ length: 12 }, () => ERRNO.notcapable));
    expect(outcomes.slice(12)).toEqual([0, ERRNO.notcapable]);
  });

  test('cannot be left by links, which are not followed and not made', async () => {
    await mkdir(path.join(dir, 'elsewhere'));
    await writeFile(path.join(dir, 'elsewhere', 'secret'), 'secret');
    await symlink(path.join(dir, 'elsewhere', 'secret'), path.join(dir, 'out', 'file'));
    await symlink(path.join(dir, 'elsewhere'), path.join(dir, 'out', 'folder'));
    await symlink('.', path.join(dir, 'out', 'self'));
    const wasm = withTexts(['file', 'folder', 'folder/secret', 'self/file', 'new', 'folder/new'], (at) =>
      [
        open(OUT, at('file'), 0, 2),
        open(OUT, at('file'), CREAT | TRUNC, 64),
        open(OUT, at('folder'), 2, 2),
        open(OUT, at('folder/secret'), 0, 2),
        open(OUT, at('self/file'), 0, 2),
        `(call $path_create_directory (i32.const ${OUT}) ${at('folder/new')})`,
        `(call $path_unlink_file (i32.const ${OUT}) ${at('folder/secret')})`,
        `(call $path_rename (i32.const ${OUT}) ${at('folder/secret')} (i32.const ${OUT}) ${at('new')})`,
        `(call $path_symlink ${at('file')} (i32.const ${OUT}) ${at('new')})`,
        `(call $path_link (i32.const ${OUT}) (i32.const 1) ${at('file')} (i32.const ${OUT}) ${at('new')})`,
        `(call $path_readlink (i32.const ${OUT}) ${at('file')} (i32.const 2000) (i32.const 100) (i32.const 3000))`,
      ]
        .map(say)
        .join('\n'),
    );
    const { loop, notdir, notsup, inval } = ERRNO;
    expect(await numbers(wasm)).toEqual([
      loop,
      loop,
      notdir,
      loop,
      loop,
      loop,
      loop,
      loop,
      notsup,
      notsup,
      inval,
    ]);
    expect(await readFile(path.join(dir, 'elsewhere', 'secret'), 'utf8')).toBe('secret');
    expect(await readdir(path.join(dir, 'elsewhere'))).toEqual(['secret']);
  });

  test('are listed in pieces of any size', async () => {
    for (const name of ['a', 'bb', 'ccc']) await writeFile(path.join(dir, 'in', name), '');
    // Each call starts where the last whole record of the one before ended; at most 30 bytes fit.
    const wasm = program(
      `(local.set $c (i64.const 0))
       (block $end (loop $more
         (drop (call $fd_readdir (i32.const 3) (i32.const 2000) (i32.const 30) (local.get $c) (i32.const 100)))
         (br_if $end (i32.lt_u (i32.load (i32.const 100)) (i32.const 24)))
         (local.set $c (i64.load (i32.const 2000)))
         (call $write (i32.const 1) (i32.const 2024) (i32.load (i32.const 2016)))
         (i32.store8 (i32.const 60) (i32.const 10)) (call $write (i32.const 1) (i32.const 60) (i32.const 1))
         (br $more)))`,
      { wasi: FUNCTIONS },
    );
    const { stdout } = await run(wasm);
    expect(stdout.trim().split('\n').sort()).toEqual(['.', '..', 'a', 'bb', 'ccc']);
  });

  test('answer wrong descriptors, pointers and paths with an error number', async () => {
    await writeFile(path.join(dir, 'in', 'file'), 'x');
    const far = '(i32.const -8)';
    const wasm = withTexts(['file', 'absent', 'file/below', '', 'a\0b', '\u00e4'], (at) =>
      [
        open(9, at('file')),
        open(1, at('file')),
        open(IN, at('absent'), 0, 2),
        open(IN, at('file/below'), 0, 2),
        open(IN, at('file'), 2, 2),
        open(IN, at(''), 0, 2),
        open(IN, at('a\0b'), 0, 2),
        open(IN, `${far} (i32.const 100)`),
        open(IN, `(i32.const 1024) (i32.const -1)`),
        open(IN, `(i32.const 1024) (i32.const 5000)`, 0, 2),
        `(call $fd_read (i32.const 3) (i32.const 540) (i32.const 1) (i32.const 548))`,
        `(call $fd_prestat_get (i32.const 3) ${far})`,
        `(call $fd_filestat_get (i32.const 3) ${far})`,
        `(call $fd_readdir (i32.const 3) ${far} (i32.const 100) (i64.const 0) (i32.const 100))`,
        `(call $fd_seek (i32.const 3) (i64.const 0) (i32.const 0) (i32.const 100))`,
        `(call $fd_renumber (i32.const 3) (i32.const 1))`,
        `(call $fd_renumber (i32.const 3) (i32.const 77))`,
        `(call $args_get ${far} (i32.const 0))`,
        `(call $environ_sizes_get ${far} (i32.const 0))`,
        // Half of a character.
        open(IN, `(i32.const ${Number(/\d+/.exec(at('\u00e4'))![0])}) (i32.const 1)`, 0, 2),
      ]
        .map(say)
        .join('\n'),
    );
    const { badf, noent, notdir, inval, fault, nametoolong, isdir, notsup } = ERRNO;
    const outcomes = await numbers(wasm);
    expect(outcomes.slice(0, 7)).toEqual([badf, badf, noent, notdir, notdir, noent, inval]);
    expect(outcomes.slice(7, 14)).toEqual([fault, fault, nametoolong, isdir, fault, fault, fault]);
    expect(outcomes.slice(14)).toEqual([isdir, notsup, badf, fault, fault, inval]);
  });

  test('move a file within and between them, and forget what was removed', async () => {
    const wasm = withTexts(['a', 'b', 'sub', 'sub/a'], (at) =>
      [
        open(OUT, at('a'), CREAT),
        write(3),
        `(call $path_create_directory (i32.const ${OUT}) ${at('sub')})`,
        `(call $path_rename (i32.const ${OUT}) ${at('a')} (i32.const ${OUT}) ${at('sub/a')})`,
        `(call $path_remove_directory (i32.const ${OUT}) ${at('sub')})`,
        `(call $path_unlink_file (i32.const ${OUT}) ${at('sub')})`,
        `(call $path_unlink_file (i32.const ${OUT}) ${at('sub/a')})`,
        `(call $path_remove_directory (i32.const ${OUT}) ${at('sub')})`,
        open(OUT, at('b'), CREAT | 4),
        open(OUT, at('b'), CREAT | 4),
      ]
        .map(say)
        .join('\n'),
    );
    expect(await numbers(wasm)).toEqual([0, 0, 0, 0, ERRNO.notempty, ERRNO.isdir, 0, 0, 0, ERRNO.exist]);
    expect(await readdir(path.join(dir, 'out'))).toEqual(['b']);
  });
});

describe('limits', () => {
  /** Writes `first` bytes, then `more` more. */
  const writer = (...steps: string[]): Uint8Array =>
    withTexts(['f', 'g', 'h'], (at) =>
      steps.map((step) => say(step.replaceAll(/\{(\w)\}/g, (_, name: string) => at(name)))).join('\n'),
    );
  const create = open(OUT, '{f}', CREAT);
  const after = async (limits: Partial<WasiCommandLimits>, ...steps: string[]): Promise<number[]> => {
    const { stdout, trap } = await runLimited(limits, writer(...steps));
    expect(trap).toBeNull();
    return stdout.trim().split(' ').map(Number);
  };
  const { dquot, mfile } = ERRNO;

  test('maxStorageBytes: as much as it says, what was there before counted, and no byte more', async () => {
    await writeFile(path.join(dir, 'out', 'old'), Buffer.alloc(40));
    const limits = { maxStorageBytes: 100 };
    expect(await after(limits, create, write(60), write(1))).toEqual([0, 0, dquot]);
    expect((await readFile(path.join(dir, 'out', 'f'))).length).toBe(60);
  });

  test('maxStorageBytes counts the holes of a file, and gives back what is removed', async () => {
    const size = (bytes: number): string => `(call $fd_filestat_set_size ${opened} (i64.const ${bytes}))`;
    const remove = `(call $path_unlink_file (i32.const ${OUT}) {f})`;
    const close = `(call $fd_close ${opened})`;
    expect(
      await after(
        { maxStorageBytes: 1000 },
        create,
        size(1001),
        size(1000),
        write(1001),
        size(0),
        write(500),
      ),
    ).toEqual([0, dquot, 0, dquot, 0, 0]);
    await rm(path.join(dir, 'out', 'f'));
    const seek = `(call $fd_seek ${opened} (i64.const 1099511627776) (i32.const 0) (i32.const 552))`;
    expect(await after({ maxStorageBytes: 1000 }, create, seek, write(1))).toEqual([0, 0, dquot]);
    await rm(path.join(dir, 'out', 'f'));
    // Removed while it is open, it takes up what it did until it is closed.
    const second = open(OUT, '{g}', CREAT).replaceAll('512', '516');
    const writeSecond = write(1, '(i32.load (i32.const 516))');
    expect(
      await after(
        { maxStorageBytes: 1000 },
        create,
        size(1000),
        remove,
        second,
        writeSecond,
        close,
        writeSecond,
      ),
    ).toEqual([0, 0, 0, 0, dquot, 0, 0]);
  });

  test('maxFiles: so many files and folders, and not one more', async () => {
    await writeFile(path.join(dir, 'out', 'old'), '');
    const folder = (name: string): string => `(call $path_create_directory (i32.const ${OUT}) {${name}})`;
    const remove = `(call $path_unlink_file (i32.const ${OUT}) {f})`;
    expect(await after({ maxFiles: 3 }, create, folder('g'), folder('h'), remove, folder('h'))).toEqual([
      0,
      0,
      dquot,
      0,
      0,
    ]);
  });

  test('maxOpenFiles: so many descriptors, the granted folders among them', async () => {
    expect(await after({ maxOpenFiles: 3 }, create, create, `(call $fd_close ${opened})`, create)).toEqual([
      0,
      mfile,
      0,
      0,
    ]);
  });

  test('maxOutputBytes: both streams together, and the program ends past it', async () => {
    const print = (fd: number, length: number): string =>
      `(call $write (i32.const ${fd}) (i32.const 1024) (i32.const ${length}))`;
    const at = await runLimited({ maxOutputBytes: 100 }, program(print(1, 60) + print(2, 40)));
    expect([at.exitCode, at.stdout.length, at.stderr.length]).toEqual([0, 60, 40]);
    const past = program(`${print(1, 60)} ${print(2, 41)} (loop $l (br $l))`);
    const error: unknown = await runLimited({ maxOutputBytes: 100 }, past).catch((thrown: unknown) => thrown);
    expect(computeReason(error)).toBe('output-limit');
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { limit: 'maxOutputBytes', value: 100 },
    });
  });

  test('output byte by byte arrives whole', async () => {
    const wasm = program(
      `(loop $l (call $write (i32.const 1) (i32.const 50) (i32.const 1))
         (br_if $l (i32.lt_u (local.tee $a (i32.add (local.get $a) (i32.const 1))) (i32.const 20000))))`,
    );
    expect((await run(wasm)).stdout).toBe('['.repeat(20_000));
  });

  test('maxWallMs ends it, named with its value', async () => {
    const error: unknown = await runLimited({ maxWallMs: 50 }, program('(loop $l (br $l))')).catch(
      (thrown: unknown) => thrown,
    );
    expect(error).toMatchObject({ code: 'deadline_exceeded', details: { limit: 'maxWallMs', value: 50 } });
  });

  test('are refused out of their bounds', () => {
    for (const limits of [
      { maxOutputBytes: 2 ** 28 },
      { maxFiles: -1 },
      { maxMemoryMb: 0 },
      { maxStorageBytes: 0.5 },
    ]) {
      expect(() => new WasiCommands(limits)).toThrow(/limit max\w+ must be/);
    }
  });
});

describe('closing', () => {
  test('ends what runs', async () => {
    const own = new WasiCommands({}, { workers: 1 });
    const running = run(
      program('(call $num (i32.const 1)) (loop $l (br $l))'),
      { onOutput: () => void own.close() },
      own,
    );
    await expect(running).rejects.toMatchObject({ code: 'failed_precondition' });
    await own.close();
    await expect(run(program(''), {}, own)).rejects.toMatchObject({ code: 'failed_precondition' });
  });

  test('closes the files a killed program had open', async () => {
    const file = path.join(dir, 'in', 'big');
    await writeFile(file, '');
    await truncate(file, 10);
    const stop = new AbortController();
    const wasm = withTexts(['big'], (at) => `${say(open(IN, at('big'), 0, 2))} (loop $l (br $l))`);
    await run(wasm, { signal: stop.signal, onOutput: () => stop.abort(new Error('stop')) }).catch(
      () => undefined,
    );
    const links = await Promise.all(
      (await readdir('/proc/self/fd').catch(() => [])).map((fd) => readFileLink(`/proc/self/fd/${fd}`)),
    );
    expect(links).not.toContain(file);
  });
});

async function readFileLink(file: string): Promise<string | null> {
  const { readlink } = await import('node:fs/promises');
  return await readlink(file).catch(() => null);
}
