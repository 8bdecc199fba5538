/** `millrace domains`: who shares the dispatcher; `domains weight`: how many turns each gets. */
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, connected, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { table } from '../text-width.ts';

/** The dispatcher's bound; told here before it is asked. */
const MAX_WEIGHT = 1000;

export function registerDomains(program: Command, session: Session): void {
  const domains = program
    .command('domains')
    .description('the domains that share the dispatcher, and how many turns each gets')
    .addHelpText(
      'after',
      `
Domains with work for a node take turns: one of weight 3 is given three tasks for each one of a domain of weight 1, whatever
the priorities of their tasks. Listed are those with a weight of their own, or with tasks that are ready or held.
${examples([['millrace domains', 'who waits, who is served, and with which weight']])}`,
    )
    .action(action(session, list));
  domains
    .command('list', { hidden: true })
    .description('the same as "millrace domains"')
    .action(action(session, list));
  domains
    .command('weight')
    .description('give a domain more turns than others, or as many again')
    .argument('<domain>', 'the id of the domain')
    .argument('<weight>', `a whole number from 1, which is that of any domain, to ${MAX_WEIGHT}`)
    .addHelpText(
      'after',
      examples([
        [
          'millrace domains weight 9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21 3',
          'three tasks for each one of another domain, from the next turn on',
        ],
      ]),
    )
    .action(action(session, weigh));
}

async function list(context: CommandContext): Promise<ExitCode> {
  const { out } = context;
  const domains = await connected(context, (requestor, signal) => requestor.domains({ signal }));
  out.result({ domains }, () => {
    if (domains.length === 0) return ['nothing waits and nothing runs, and every domain has weight 1'];
    return table(
      [
        { title: 'DOMAIN' },
        { title: 'WEIGHT', align: 'right' },
        { title: 'READY', align: 'right' },
        { title: 'RUNNING', align: 'right' },
      ],
      domains.map(({ domain_id, weight, ready, held }) => [
        domain_id,
        String(weight),
        String(ready),
        String(held),
      ]),
      out.paint.dim,
    );
  });
  return EXIT.done;
}

async function weigh(
  context: CommandContext,
  _options: unknown,
  domain: string,
  text: string,
): Promise<ExitCode> {
  const { out } = context;
  const weight = /^\d{1,4}$/.test(text) ? Number(text) : 0;
  if (weight < 1 || weight > MAX_WEIGHT) {
    throw new MillraceError(
      'invalid_argument',
      `the weight of a domain must be a whole number from 1 to ${MAX_WEIGHT}, got ${JSON.stringify(text)}`,
    );
  }
  await connected(context, (requestor, signal) => requestor.setWeight(domain, weight, { signal }));
  out.result({ domain_id: domain, weight }, () => [`domain ${domain} has weight ${weight}`]);
  return EXIT.done;
}
