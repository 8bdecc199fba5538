/** `millrace dispatch serve`: the dispatcher by itself. */
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, examples, type Session } from '../command.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import type { LocalDispatcherOptions } from '../local-dispatcher.ts';
import { BLOBS_HELP, blobsPlace, storePlace } from '../places.ts';
import { parseInteger } from '../units.ts';

interface ServeOptions {
  readonly host: string;
  readonly port: string;
  readonly store?: string;
  readonly blobs?: string;
  readonly publicUrl?: string;
  readonly taskLog: string;
  readonly leaseTtl?: string;
  readonly keepJobs?: string;
  readonly pruneArtifacts?: boolean;
}

export function registerDispatch(program: Command, session: Session): void {
  program
    .command('dispatch')
    .description('the dispatcher by itself')
    .command('serve')
    .description('run a dispatcher until a signal; the first line on stdout is a JSON object with its url')
    .option('--host <host>', 'address to listen on', '127.0.0.1')
    .option('--port <port>', 'port; 0 picks a free one', '7070')
    .option(
      '--store <url>',
      'sqlite:PATH or postgres://… (default: MILLRACE_STORE, else sqlite:millrace.db in the data folder)',
    )
    .option('--blobs <url>', BLOBS_HELP)
    .option('--public-url <url>', 'how others reach it, when that is not host and port')
    .option('--task-log <MiB>', 'kept of what one attempt of a task says; 0 keeps nothing', '16')
    .option(
      '--lease-ttl <seconds>',
      'how long a lease lives without a heartbeat, 1 to 86400 (default: MILLRACE_LEASE_TTL, else 15)',
    )
    .option(
      '--keep-jobs <days>',
      'remove jobs that ended longer ago, such as 30 or 0.5 (default: MILLRACE_KEEP_JOBS, else keep all)',
    )
    .option(
      '--prune-artifacts',
      'what the tasks of a removed job made goes with it (default: MILLRACE_PRUNE_ARTIFACTS, else it stays)',
    )
    .addHelpText(
      'after',
      examples([
        ['millrace dispatch serve', 'on this machine only, state in the data folder'],
        [
          'millrace dispatch serve --host 0.0.0.0 --public-url https://jobs.example.org',
          'behind a proxy that does TLS',
        ],
        ['millrace dispatch serve --port 0 --data ./state', 'any free port, told on the first line'],
        ['millrace dispatch serve --keep-jobs 30 --prune-artifacts', 'a month of history and results'],
        [
          'PGPASSWORD=… millrace dispatch serve --store postgres://millrace@db.example.org/millrace',
          'one of any number of dispatchers on a PostgreSQL database',
        ],
        [
          'AWS_PROFILE=millrace millrace dispatch serve --blobs "s3://my-bucket/blobs?region=eu-west-1"',
          'artifacts in S3; credentials come from the standard AWS chain',
        ],
      ]) +
        '\nThe client token is in the file client-token of the data folder. SIGTERM ends open requests, then stops.\n',
    )
    .action(action(session, serve));
}

async function serve(context: CommandContext, options: ServeOptions): Promise<ExitCode> {
  const { io, out } = context;
  const port = parseInteger(options.port, '--port', 0, 65_535);
  const taskLogBytes = parseInteger(options.taskLog, '--task-log', 0, 4096) * 1024 * 1024;
  const leaseTtlMs = leaseTtlOf(options, io.env);
  const retention = retentionOf(options, io.env);
  const dataDir = resolveDataDir(context);
  const store = await storePlace(options.store, io);
  const blobs = await blobsPlace(options.blobs, io);
  if (options.publicUrl !== undefined && !/^https?:$/.test(protocolOf(options.publicUrl))) {
    throw new MillraceError(
      'invalid_argument',
      `--public-url must be an http or https URL, got ${JSON.stringify(options.publicUrl)}`,
    );
  }
  const [{ openLocalDispatcher }, { operatorLogger }, { openTracer }] = await Promise.all([
    import('../local-dispatcher.ts'),
    import('../operator-log.ts'),
    import('../tracing.ts'),
  ]);
  let stop = (): void => {};
  const stopped = new Promise<void>((done) => {
    stop = done;
  });
  using _ = io.onStop(() => stop());
  const log = operatorLogger(io);
  await using tracer = await openTracer(io.env, 'millrace-dispatcher', log);
  await using opened = await openLocalDispatcher({
    dataDir,
    pid: io.pid,
    host: options.host,
    port,
    log,
    limits: { taskLogBytes },
    ...(leaseTtlMs !== null && { leaseTtlMs }),
    ...(retention !== null && { retention }),
    ...(tracer !== null && { tracer }),
    ...(options.publicUrl !== undefined && { publicUrl: options.publicUrl.replace(/\/+$/, '') }),
    ...(store !== null && { store }),
    ...(blobs !== null && { blobs }),
  });
  out.document({ url: opened.dispatcher.url, public_url: opened.url, data: dataDir, pid: io.pid });
  await stopped;
  return EXIT.done;
}

/** What `--lease-ttl` or its variable says, in milliseconds; null: neither. */
function leaseTtlOf({ leaseTtl }: ServeOptions, env: CommandContext['io']['env']): number | null {
  const name = leaseTtl === undefined ? 'MILLRACE_LEASE_TTL' : '--lease-ttl';
  const text = leaseTtl ?? (env['MILLRACE_LEASE_TTL'] || undefined);
  return text === undefined ? null : parseInteger(text, name, 1, 86_400) * 1000;
}

const DAY_MS = 86_400_000;
/** A hundred years: more is a mistake, and whatever is no number. */
const MOST_DAYS = 36_500;

/** What `--keep-jobs` and `--prune-artifacts`, or their variables, say; null: all jobs are kept. */
function retentionOf(
  { keepJobs, pruneArtifacts }: ServeOptions,
  env: CommandContext['io']['env'],
): LocalDispatcherOptions['retention'] | null {
  const name = keepJobs === undefined ? 'MILLRACE_KEEP_JOBS' : '--keep-jobs';
  const text = keepJobs ?? (env['MILLRACE_KEEP_JOBS'] || undefined);
  const artifacts = pruneArtifacts ?? flagOf('MILLRACE_PRUNE_ARTIFACTS', env);
  if (text === undefined) {
    if (!artifacts) return null;
    throw new MillraceError(
      'invalid_argument',
      '--prune-artifacts (MILLRACE_PRUNE_ARTIFACTS) removes artifacts along with their jobs; say how long those are kept with --keep-jobs DAYS',
    );
  }
  const days = /^\d+(?:\.\d+)?$/.test(text.trim()) ? Number(text) : Number.NaN;
  if (!(days > 0 && days <= MOST_DAYS)) {
    throw new MillraceError(
      'invalid_argument',
      `${name} must be a number of days above 0 and up to ${MOST_DAYS}, got ${JSON.stringify(text)}`,
    );
  }
  return { keepJobsMs: days * DAY_MS, artifacts };
}

function flagOf(name: string, env: CommandContext['io']['env']): boolean {
  const value = env[name] ?? '';
  if (['', '0', 'false'].includes(value)) return false;
  if (['1', 'true'].includes(value)) return true;
  throw new MillraceError('invalid_argument', `${name} must be true or false, got ${JSON.stringify(value)}`);
}

function protocolOf(url: string): string {
  return URL.canParse(url) ? new URL(url).protocol : '';
}
