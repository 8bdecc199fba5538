/**
 * A runtime in command mode: a process for every command, nothing that stays. Volumes: `/in`, `/out`.
 *
 *   sha256 FILE…      digests, as sha256sum prints them
 *   gzip FILE OUT
 *   gunzip FILE OUT
 *
 * The compression level is configured: `{"level": 9}` in `~/.local/share/packer/packer.json`.
 */
import { createHash } from 'node:crypto';
import type { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { createGunzip, createGzip, gunzipSync, gzipSync } from 'node:zlib';
import { RuntimeError, defineRuntime, runRuntime, type CommandContext } from '@millrace/runtime';
import { VOLUMES, openInput, openOutput } from './volume-files.ts';

async function digest(command: CommandContext, workdir: string, files: readonly string[]): Promise<void> {
  for (const file of files) {
    const hash = createHash('sha256');
    await pipeline(openInput(workdir, file), hash, { signal: command.signal });
    await command.stdout(`${hash.digest('hex')}  ${file}\n`);
  }
}

async function convert(
  command: CommandContext,
  workdir: string,
  [from = '', to = '']: readonly string[],
  through: Transform,
): Promise<void> {
  await pipeline(openInput(workdir, from), through, openOutput(workdir, to), { signal: command.signal });
}

await runRuntime(
  defineRuntime({
    name: 'packer',
    version: '0.1.0',
    description: 'Digests, packs and unpacks files.',
    mode: 'command',
    config: { defaults: { level: 6 } },
    deploy: () => ({ vols: VOLUMES }),
    runCommand(ctx, { entryPoint, args }) {
      const workdir = ctx.cli.workdir!;
      const { level } = ctx.config;
      return ctx.command((command) => {
        switch (entryPoint) {
          case 'sha256':
            return digest(command, workdir, args);
          case 'gzip':
            return convert(command, workdir, args, createGzip({ level }));
          case 'gunzip':
            return convert(command, workdir, args, createGunzip());
          default:
            throw new RuntimeError(`${entryPoint} is no command; there are sha256, gzip, gunzip`, {
              exitCode: 127,
            });
        }
      });
    },
    test() {
      const text = 'self-test';
      if (gunzipSync(gzipSync(text)).toString() !== text) throw new RuntimeError('zlib does not work here');
    },
  }),
);
