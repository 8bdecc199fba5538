/**
 * A self-contained runtime in server mode: it stays up and offers commands on text files. Volumes: `/in`, `/out`.
 *
 *   count FILE…               lines, words and bytes
 *   search PATTERN FILE…      the lines that match a regular expression; ends with 1 when there are none
 *   top N FILE…               the N most frequent words
 *   replace PATTERN TEXT FILE OUT
 */
import { createInterface } from 'node:readline';
import { pipeline } from 'node:stream/promises';
import { RuntimeError, defineRuntime, runRuntime, type CommandContext } from '@millrace/runtime';
import { VOLUMES, openInput, openOutput } from './volume-files.ts';

type Tool = (command: CommandContext, workdir: string, args: readonly string[]) => Promise<void>;

/** Bytes read by all commands: what a provider of this runtime might charge for. */
let bytesRead = 0;

const TOOLS: Readonly<Record<string, Tool>> = {
  async count(command, workdir, files) {
    for (const file of files) {
      let lines = 0;
      let words = 0;
      let bytes = 0;
      for await (const line of linesOf(command, workdir, file)) {
        lines += 1;
        words += line.split(/\s+/).filter(Boolean).length;
        bytes += Buffer.byteLength(line) + 1;
      }
      await command.stdout(`${lines} ${words} ${bytes} ${file}\n`);
    }
  },

  async search(command, workdir, [pattern = '', ...files]) {
    const expression = compile(pattern);
    let found = 0;
    for (const file of files) {
      for await (const line of linesOf(command, workdir, file)) {
        if (!expression.test(line)) continue;
        found += 1;
        await command.stdout(`${line}\n`);
      }
    }
    command.exitCode = found === 0 ? 1 : 0;
  },

  async top(command, workdir, [count = '', ...files]) {
    const wanted = Number(count);
    if (!(wanted > 0))
      throw new RuntimeError(`top needs a number, got ${JSON.stringify(count)}`, { exitCode: 2 });
    const counts = new Map<string, number>();
    for (const file of files) {
      for await (const line of linesOf(command, workdir, file)) {
        for (const [word] of line.toLowerCase().matchAll(/\p{L}+/gu))
          counts.set(word, (counts.get(word) ?? 0) + 1);
      }
    }
    const ranked = [...counts].sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1)).slice(0, wanted);
    for (const [word, times] of ranked) await command.stdout(`${times} ${word}\n`);
  },

  async replace(command, workdir, [pattern = '', text = '', file = '', out = '']) {
    const expression = compile(pattern);
    await pipeline(
      async function* () {
        for await (const line of linesOf(command, workdir, file))
          yield `${line.replaceAll(expression, text)}\n`;
      },
      openOutput(workdir, out),
      { signal: command.signal },
    );
  },
};

async function* linesOf(command: CommandContext, workdir: string, file: string): AsyncGenerator<string> {
  const input = openInput(workdir, file);
  // Opened before lines are asked for: the line reader does not pass on what goes wrong with its input.
  await new Promise<void>((resolve, reject) => input.once('ready', resolve).once('error', reject));
  for await (const line of createInterface({ input, crlfDelay: Infinity })) {
    command.signal.throwIfAborted();
    yield line;
  }
  bytesRead += input.bytesRead;
  await command.counter('text-tools.bytes-read', bytesRead);
}

function compile(pattern: string): RegExp {
  try {
    return new RegExp(pattern, 'gu');
  } catch (error) {
    throw new RuntimeError('the pattern is no regular expression', { exitCode: 2, cause: error });
  }
}

await runRuntime(
  defineRuntime({
    name: 'text-tools',
    version: '0.1.0',
    description: 'Counts, searches and rewrites text files.',
    deploy: () => ({ vols: VOLUMES }),
    runCommand(ctx, { entryPoint, args }) {
      const tool = Object.hasOwn(TOOLS, entryPoint) ? TOOLS[entryPoint] : undefined;
      if (!tool) {
        throw new RuntimeError(`${entryPoint} is no tool; there are ${Object.keys(TOOLS).join(', ')}`, {
          kind: 'not_found',
        });
      }
      return ctx.command((command) => tool(command, ctx.cli.workdir!, args));
    },
    offer: () => ({ properties: { 'golem.runtime.text-tools': Object.keys(TOOLS) } }),
  }),
);
