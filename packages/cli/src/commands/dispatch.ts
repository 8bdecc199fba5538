/** `millrace dispatch serve`: the dispatcher by itself. */
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, examples, type Session } from '../command.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { parseInteger } from '../units.ts';

interface ServeOptions {
  readonly host: string;
  readonly port: string;
  readonly store?: string;
  readonly blobs?: string;
  readonly publicUrl?: string;
}

export function registerDispatch(program: Command, session: Session): void {
  program
    .command('dispatch')
    .description('the dispatcher by itself')
    .command('serve')
    .description('run a dispatcher until a signal; the first line on stdout is a JSON object with its url')
    .option('--host <host>', 'address to listen on', '127.0.0.1')
    .option('--port <port>', 'port; 0 picks a free one', '7070')
    .option('--store <url>', 'sqlite:PATH (default: sqlite:millrace.db in the data folder)')
    .option('--blobs <url>', 'file:DIR (default: file:blobs in the data folder)')
    .option('--public-url <url>', 'how others reach it, when that is not host and port')
    .addHelpText(
      'after',
      examples([
        ['millrace dispatch serve', 'on this machine only, state in the data folder'],
        [
          'millrace dispatch serve --host 0.0.0.0 --public-url https://jobs.example.org',
          'behind a proxy that does TLS',
        ],
        ['millrace dispatch serve --port 0 --data ./state', 'any free port, told on the first line'],
      ]) +
        '\nThe client token is in the file client-token of the data folder. SIGTERM ends open requests, then stops.\n',
    )
    .action(action(session, serve));
}

async function serve(context: CommandContext, options: ServeOptions): Promise<ExitCode> {
  const { io, out } = context;
  const port = parseInteger(options.port, '--port', 0, 65_535);
  const dataDir = resolveDataDir(context);
  const storePath = await localPlace(options.store, '--store', 'sqlite', io.cwd);
  const blobsDir = await localPlace(options.blobs, '--blobs', 'file', io.cwd);
  if (options.publicUrl !== undefined && !/^https?:$/.test(protocolOf(options.publicUrl))) {
    throw new MillraceError(
      'invalid_argument',
      `--public-url must be an http or https URL, got ${JSON.stringify(options.publicUrl)}`,
    );
  }
  const [{ openLocalDispatcher }, { operatorLogger }] = await Promise.all([
    import('../local-dispatcher.ts'),
    import('../operator-log.ts'),
  ]);
  let stop = (): void => {};
  const stopped = new Promise<void>((done) => {
    stop = done;
  });
  using _ = io.onStop(() => stop());
  await using opened = await openLocalDispatcher({
    dataDir,
    pid: io.pid,
    host: options.host,
    port,
    log: operatorLogger(io),
    ...(options.publicUrl !== undefined && { publicUrl: options.publicUrl.replace(/\/+$/, '') }),
    ...(storePath !== null && { storePath }),
    ...(blobsDir !== null && { blobsDir }),
  });
  out.document({ url: opened.dispatcher.url, public_url: opened.url, data: dataDir, pid: io.pid });
  await stopped;
  return EXIT.done;
}

function protocolOf(url: string): string {
  return URL.canParse(url) ? new URL(url).protocol : '';
}

/** The path behind `sqlite:PATH` or `file:DIR`, from `cwd`; null when the option is absent. */
async function localPlace(
  value: string | undefined,
  option: '--store' | '--blobs',
  scheme: 'sqlite' | 'file',
  cwd: string,
): Promise<string | null> {
  if (value === undefined) return null;
  const shape = scheme === 'sqlite' ? 'sqlite:PATH' : 'file:DIR';
  if (/^(?:postgres(?:ql)?|s3):/i.test(value)) {
    throw new MillraceError(
      'unimplemented',
      `${option} ${value.slice(0, value.indexOf(':'))}: is not in this version; use ${shape}`,
    );
  }
  const place = value.startsWith(`${scheme}:`) ? value.slice(scheme.length + 1) : '';
  if (place === '') {
    throw new MillraceError('invalid_argument', `${option} must be ${shape}, got ${JSON.stringify(value)}`);
  }
  const path = await import('node:path');
  // `file:///srv/blobs` and `sqlite:///srv/db` are spelled like URLs; the slashes before the path are not part of it.
  return path.resolve(cwd, place.replace(/^\/\/(?=\/)/, ''));
}
