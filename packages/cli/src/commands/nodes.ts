/** `millrace nodes`: who works for the dispatcher; `nodes add`: credentials for one more. */
import path from 'node:path';
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine, table } from '../text-width.ts';
import { formatBytes, formatTime } from '../units.ts';

interface AddOptions {
  readonly name: string;
  readonly mode: string;
  readonly out?: string;
}

export function registerNodes(program: Command, session: Session): void {
  const nodes = program
    .command('nodes')
    .description('list the nodes of the dispatcher')
    .addHelpText(
      'after',
      examples([['millrace nodes', 'who is there, what they do, when they last asked for work']]),
    )
    .action(action(session, list));
  nodes
    .command('add')
    .description('make a key and credentials for a new node, as an env file for "millrace node start"')
    .requiredOption('--name <name>', 'what the node is called')
    .option('--mode <mode>', 'dedicated: work of this dispatcher only; public: public work only', 'dedicated')
    // Not --env-file: for a file that does not exist yet Node itself ends the process when it sees that name, even behind
    // the script (nodejs/node#54232).
    .option('--out <file>', 'write it there, readable by you only, and not on stdout')
    .addHelpText(
      'after',
      examples([
        [
          'millrace nodes add --name garage --out garage.env',
          'then: millrace node start --env-file garage.env --runner ./resize.ts',
        ],
      ]),
    )
    .action(action(session, add));
}

async function list(context: CommandContext): Promise<ExitCode> {
  const { io, out } = context;
  const { resolveAddress, withRequestor } = await import('../connection.ts');
  const nodes = await withRequestor(await resolveAddress(context), (requestor) => requestor.nodes());
  out.result({ nodes }, () => {
    if (nodes.length === 0)
      return ['no nodes yet; "millrace nodes add --name NAME" makes credentials for one'];
    return table(
      [
        { title: 'NAME' },
        { title: 'ID' },
        { title: 'MODE' },
        { title: 'SEEN' },
        { title: 'BUSY', align: 'right' },
        { title: 'RESOURCES' },
        { title: 'CAPABILITIES' },
      ],
      nodes.map((node) => [
        oneLine(node.name),
        node.id,
        node.mode,
        node.last_seen_at === null
          ? node.registered_at === null
            ? 'never registered'
            : 'registered'
          : formatTime(node.last_seen_at, io.now()),
        `${node.active_leases}/${node.max_concurrency}`,
        Object.entries(node.resources ?? {})
          .map(([name, amount]) => shareOf(name, node.resources_in_use?.[name] ?? 0, amount))
          .join(' ') || '-',
        oneLine(node.capabilities.join(' ')) || '-',
      ]),
      out.paint.dim,
    );
  });
  return EXIT.done;
}

/** `cpu 1.5/4`, `memory 512 MiB/8 GiB`. */
function shareOf(name: string, inUse: number, amount: number): string {
  const shown = (value: number): string => (name === 'memory' ? formatBytes(value) : String(value));
  return `${name} ${shown(inUse)}/${shown(amount)}`;
}

async function add(context: CommandContext, options: AddOptions): Promise<ExitCode> {
  const { io, out } = context;
  const { name, mode } = options;
  if (mode !== 'public' && mode !== 'dedicated') {
    throw new MillraceError(
      'invalid_argument',
      `--mode must be public or dedicated, got ${JSON.stringify(mode)}`,
    );
  }
  const file = options.out === undefined ? null : path.resolve(io.cwd, options.out);
  const [{ resolveAddress, withRequestor }, { createIdentity, envFileText }, { reservePrivateFile }] =
    await Promise.all([
      import('../connection.ts'),
      import('../node-identity.ts'),
      import('../private-file.ts'),
    ]);
  const address = await resolveAddress(context);
  // The file first: credentials that could not be kept would be a node nobody can use.
  await using reserved = file === null ? null : await reservePrivateFile(file);
  const { id, env } = await withRequestor(address, (requestor) =>
    createIdentity(requestor, address.url, { name, mode }),
  );
  await reserved?.write(envFileText(name, env));
  out.result(file === null ? { id, name, mode, env } : { id, name, mode, env_file: file }, () =>
    file === null ? [envFileText(name, env).trimEnd()] : [file],
  );
  out.note(
    `node ${id} added; start it with: millrace node start --env-file ${options.out ?? 'FILE'} --runner MODULE`,
  );
  return EXIT.done;
}
