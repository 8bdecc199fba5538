/** `millrace queues`: how much work waits, and who could do it. */
import type { Command } from 'commander';
import { action, connected, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine, table } from '../text-width.ts';
import { formatBytes, formatDuration } from '../units.ts';

export function registerQueues(program: Command, session: Session): void {
  program
    .command('queues')
    .description('how much work waits, by what it demands of a node, and who could do it')
    .addHelpText(
      'after',
      examples([
        ['millrace queues', 'what to start nodes for'],
        [
          `millrace queues --json | jq '[.queues[] | select(.free_slots < .ready) | .capability] | unique'`,
          'capabilities with more work than free slots, for a script that starts nodes',
        ],
      ]),
    )
    .action(action(session, list));
}

async function list(context: CommandContext): Promise<ExitCode> {
  const { out } = context;
  const report = await connected(context, (requestor, signal) => requestor.queues({ signal }));
  out.result(report, () => {
    if (report.queues.length === 0) return ['nothing waits and nothing runs'];
    return table(
      [
        { title: 'CAPABILITY' },
        { title: 'DEMANDS' },
        { title: 'READY', align: 'right' },
        { title: 'BLOCKED', align: 'right' },
        { title: 'DELAYED', align: 'right' },
        { title: 'RUNNING', align: 'right' },
        { title: 'OLDEST', align: 'right' },
        { title: 'NODES', align: 'right' },
        { title: 'FREE', align: 'right' },
      ],
      report.queues.map((queue) => [
        oneLine(queue.capability) + (queue.mode === 'dedicated' ? ' (dedicated)' : ''),
        oneLine(
          [
            ...Object.entries(queue.capability_filters).map(([name, value]) =>
              typeof value === 'string' ? `${name}=${value}` : `${name} ${JSON.stringify(value)}`,
            ),
            ...Object.entries(queue.resources ?? {}).map(([name, amount]) =>
              name === 'memory' ? formatBytes(amount) : `${amount} ${name}`,
            ),
          ].join(' '),
        ) || '-',
        queue.limited === 0 ? String(queue.ready) : `${queue.ready} (${queue.limited} limited)`,
        String(queue.blocked),
        String(queue.delayed),
        String(queue.running),
        queue.oldest_age_ms === null ? '-' : formatDuration(queue.oldest_age_ms),
        queue.nodes_away === 0 ? String(queue.nodes) : `${queue.nodes} (${queue.nodes_away} away)`,
        `${queue.free_slots}/${queue.slots}`,
      ]),
      out.paint.dim,
    );
  });
  return EXIT.done;
}
