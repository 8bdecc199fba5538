/**
 * The command line every runtime understands: `RUNTIME [options] [positionals] SUBCOMMAND [words]`.
 *
 * All options a supervisor may send are known, typed and checked, the author's own stand beside them, and nothing is
 * ignored: what is not declared is a usage error. Options come before the subcommand. Values follow as the next word
 * or after `=`; those of short options may also be glued on.
 */
import { isObject } from './canonical-json.ts';

/** An option of the author's. */
export interface CliOption {
  readonly type: 'string' | 'number' | 'boolean';
  /** One letter. */
  readonly short?: string;
  /** May be given several times; the value is then an array. Default false. */
  readonly multiple?: boolean;
  /** Default false. */
  readonly required?: boolean;
  /** Used when the option is not given. */
  readonly default?: string | number;
  /** For the help text. */
  readonly description?: string;
}

export type CliOptions = Readonly<Record<string, CliOption>>;

type BaseValue<O extends CliOption> = O['type'] extends 'number' ? number : string;

/** What a declared option becomes: flags are boolean, what may be missing is null, what may repeat an array. */
export type OptionValue<O extends CliOption> = O['type'] extends 'boolean'
  ? boolean
  : O extends { readonly multiple: true }
    ? readonly BaseValue<O>[]
    : O extends { readonly required: true } | { readonly default: string | number }
      ? BaseValue<O>
      : BaseValue<O> | null;

/** A word of the author's before the subcommand. */
export interface CliPositional {
  readonly name: string;
  /** Default false. Required ones come first. */
  readonly required?: boolean;
  readonly description?: string;
}

export interface CliDeclaration<Options extends CliOptions = CliOptions> {
  readonly options?: Options;
  readonly positionals?: readonly CliPositional[];
}

/** How a volume is to be provided, from `--volume-override`. */
export type VolumeKind =
  | { readonly host: object }
  | { readonly ram: { readonly size: string | number } }
  | {
      readonly storage: {
        readonly size: string | number;
        readonly preallocate?: string | number | null;
        readonly errors?: string | null;
      };
    };

export const SUBCOMMANDS = ['deploy', 'start', 'run', 'test', 'offer-template'] as const;
export type Subcommand = (typeof SUBCOMMANDS)[number];

/** The command line, read. `null` where an option was not given. */
export interface ParsedCli<Options extends CliOptions = CliOptions> {
  /** `--workdir`, as given. Never null in `deploy`, `start` and `run`. */
  readonly workdir: string | null;
  /** `--task-package`: path of the downloaded image. */
  readonly taskPackage: string | null;
  /** `--cpu-cores`. */
  readonly cpuCores: number | null;
  /** `--mem-gib`. */
  readonly memGib: number | null;
  /** `--storage-gib`. */
  readonly storageGib: number | null;
  /** `--volume-override`: path inside the runtime to how it is to be provided. */
  readonly volumeOverride: Readonly<Record<string, VolumeKind>> | null;
  /** `--hostname`. */
  readonly hostname: string | null;
  /** `--vpn-endpoint`, such as `udp://127.0.0.1:41234`. */
  readonly vpnEndpoint: string | null;
  /** `--inet-endpoint`. */
  readonly inetEndpoint: string | null;
  /** The author's options by name. */
  readonly options: { readonly [Name in keyof Options]: OptionValue<Options[Name]> };
  /** The author's positionals by name; null where missing. */
  readonly positionals: Readonly<Record<string, string | null>>;
  readonly command: {
    readonly name: Subcommand;
    /** What `run` is to run; null in the others. */
    readonly entryPoint: string | null;
    readonly args: readonly string[];
  };
}

/** The command line breaks a rule; the message says which, and what to do. */
export class UsageError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'UsageError';
  }
}

/** What was asked for: a subcommand, or one of two texts. */
export type CliRequest =
  | { readonly kind: 'command'; readonly cli: ParsedCli }
  | { readonly kind: 'help' }
  | { readonly kind: 'version' };

interface StandardOption extends CliOption {
  readonly value: string;
  /** What a value of the right type must be beyond that, or null when it is. */
  readonly rule?: (value: string | number | boolean) => string | null;
}

const countRule = (value: unknown): string | null =>
  Number.isSafeInteger(value) && Number(value) >= 0 ? null : 'a whole number from 0';
const amountRule = (value: unknown): string | null => (Number(value) >= 0 ? null : 'a number from 0');
const urlRule = (value: unknown): string | null =>
  /^[a-z][a-z0-9+.-]*:\/\/./i.test(String(value)) ? null : 'a URL such as udp://127.0.0.1:41234';

const STANDARD: Readonly<Record<string, StandardOption>> = {
  workdir: {
    type: 'string',
    short: 'w',
    value: 'DIR',
    description: 'work directory; needed by deploy, start and run',
  },
  'task-package': { type: 'string', short: 't', value: 'FILE', description: 'image to deploy' },
  'cpu-cores': {
    type: 'number',
    value: 'N',
    rule: countRule,
    description: 'CPU cores of the agreement',
  },
  'mem-gib': {
    type: 'number',
    value: 'N',
    rule: amountRule,
    description: 'memory of the agreement, GiB',
  },
  'storage-gib': {
    type: 'number',
    value: 'N',
    rule: amountRule,
    description: 'storage of the agreement, GiB',
  },
  'volume-override': { type: 'string', value: 'JSON', description: 'volumes of the requestor' },
  hostname: { type: 'string', value: 'NAME', description: 'host name of the requestor' },
  'vpn-endpoint': {
    type: 'string',
    value: 'URL',
    rule: urlRule,
    description: 'where VPN frames are exchanged',
  },
  'inet-endpoint': {
    type: 'string',
    value: 'URL',
    rule: urlRule,
    description: 'where outbound frames are exchanged',
  },
};
const NEEDS_WORKDIR: readonly Subcommand[] = ['deploy', 'start', 'run'];
const OPTION_NAME = /^[a-z][a-z0-9-]*$/;

/** @throws RangeError for a declaration that clashes with the standard options or itself. */
export function checkDeclaration(declaration: CliDeclaration): void {
  const shorts = new Set(['h', 'V', ...Object.values(STANDARD).map(({ short }) => short)]);
  for (const [name, option] of Object.entries(declaration.options ?? {})) {
    if (!OPTION_NAME.test(name))
      throw new RangeError(`option ${JSON.stringify(name)} must match ${OPTION_NAME}`);
    if (Object.hasOwn(STANDARD, name) || name === 'help' || name === 'version') {
      throw new RangeError(`option --${name} is a standard option; read it from ctx.cli`);
    }
    if (option.short === undefined) continue;
    if (!/^[a-zA-Z]$/.test(option.short) || shorts.has(option.short)) {
      throw new RangeError(
        `option --${name}: short name ${JSON.stringify(option.short)} must be one free letter`,
      );
    }
    shorts.add(option.short);
  }
}

/** @throws UsageError naming the word and the rule. */
export function parseCommandLine(declaration: CliDeclaration, argv: readonly string[]): CliRequest {
  const declared: Record<string, CliOption> = { ...STANDARD, ...declaration.options };
  const given = new Map<string, (string | number | boolean)[]>();
  const positionals: string[] = [];
  let at = 0;
  let command: Subcommand | null = null;
  while (at < argv.length && command === null) {
    const word = argv[at]!;
    at += 1;
    if (word === '--help' || word === '-h' || word === 'help') return { kind: 'help' };
    if (word === '--version' || word === '-V') return { kind: 'version' };
    if (isSubcommand(word)) command = word;
    else if (word.startsWith('-') && word !== '-') at = readOption(declared, given, argv, at - 1);
    else positionals.push(word);
  }
  const wanted = declaration.positionals ?? [];
  if (positionals.length > wanted.length) {
    const extra = positionals[wanted.length]!;
    throw new UsageError(`unknown subcommand ${JSON.stringify(extra)}; there are ${SUBCOMMANDS.join(', ')}`);
  }
  if (command === null) throw new UsageError(`a subcommand is missing: one of ${SUBCOMMANDS.join(', ')}`);
  if (argv[at] === '--help' || argv[at] === '-h') return { kind: 'help' };
  const missing = wanted.find(({ required }, index) => required && positionals[index] === undefined);
  if (missing) throw new UsageError(`${missing.name} is missing before ${command}`);
  for (const [name, option] of Object.entries(declaration.options ?? {})) {
    if (option.required && !given.has(name)) throw new UsageError(`option --${name} is required`);
  }
  if (NEEDS_WORKDIR.includes(command) && !given.has('workdir')) {
    throw new UsageError(`option --workdir is required for ${command}`);
  }
  const text = (name: string): string | null => (given.get(name)?.[0] as string | undefined) ?? null;
  const number = (name: string): number | null => (given.get(name)?.[0] as number | undefined) ?? null;
  return {
    kind: 'command',
    cli: {
      workdir: text('workdir'),
      taskPackage: text('task-package'),
      cpuCores: number('cpu-cores'),
      memGib: number('mem-gib'),
      storageGib: number('storage-gib'),
      volumeOverride: parseVolumeOverride(text('volume-override')),
      hostname: text('hostname'),
      vpnEndpoint: text('vpn-endpoint'),
      inetEndpoint: text('inet-endpoint'),
      options: Object.fromEntries(
        Object.entries(declaration.options ?? {}).map(([name, option]) => [
          name,
          finalValue(option, given.get(name)),
        ]),
      ) as ParsedCli['options'],
      positionals: Object.fromEntries(wanted.map(({ name }, index) => [name, positionals[index] ?? null])),
      command: { name: command, ...readWords(command, argv.slice(at)) },
    },
  };
}

/** The help text. */
export function helpText(
  runtime: { readonly name: string; readonly version: string; readonly description?: string },
  declaration: CliDeclaration,
): string {
  const positionals = (declaration.positionals ?? []).map(({ name, required }) =>
    required ? `<${name}>` : `[${name}]`,
  );
  const own = Object.entries(declaration.options ?? {}).map(([name, option]) =>
    optionLine(name, option, option.type === 'boolean' ? '' : ` <${option.type}>`),
  );
  const standard = Object.entries(STANDARD).map(([name, option]) =>
    optionLine(name, option, ` <${option.value}>`),
  );
  return [
    `${runtime.name} ${runtime.version}`,
    ...(runtime.description === undefined ? [] : [runtime.description]),
    '',
    `Usage: ${[runtime.name, '[options]', ...positionals, '<subcommand> [words]'].join(' ')}`,
    '',
    'Subcommands:',
    '  deploy            set up the work directory, print volumes and mode',
    '  start             start; in server mode stdin and stdout carry the protocol from then on',
    '  run [--entrypoint <entry>] -- <words>   run one command',
    '  test              self-test',
    '  offer-template    print properties and constraints for the offer',
    '',
    'Options:',
    ...own,
    ...standard,
    '  -h, --help        print this',
    '  -V, --version     print name and version',
    '',
  ].join('\n');
}

function optionLine(name: string, option: CliOption, value: string): string {
  const head = `  ${option.short === undefined ? '   ' : `-${option.short},`} --${name}${value}`;
  return `${head.padEnd(34)}${option.description ?? ''}`.trimEnd();
}

function isSubcommand(word: string): word is Subcommand {
  return (SUBCOMMANDS as readonly string[]).includes(word);
}

/** Reads the option at `at`; answers where the next word is. */
function readOption(
  declared: Readonly<Record<string, CliOption>>,
  given: Map<string, (string | number | boolean)[]>,
  argv: readonly string[],
  at: number,
): number {
  const word = argv[at]!;
  const long = /^--([^=]+)(?:=([^]*))?$/.exec(word);
  const short = long ? null : word.slice(1, 2);
  const name = long?.[1] ?? Object.keys(declared).find((key) => declared[key]!.short === short);
  const shown = long ? `--${long[1]}` : `-${short}`;
  if (name === undefined || !Object.hasOwn(declared, name)) {
    throw new UsageError(`unknown option ${shown}; --help lists the options`);
  }
  const option = declared[name]!;
  let attached = long?.[2];
  if (!long && word.length > 2) attached = word.slice(word[2] === '=' ? 3 : 2);
  if (given.has(name) && !option.multiple) throw new UsageError(`option ${shown} was given twice`);
  const values = given.get(name) ?? [];
  given.set(name, values);
  if (option.type === 'boolean') {
    if (attached !== undefined)
      throw new UsageError(`option ${shown} takes no value, got ${JSON.stringify(attached)}`);
    values.push(true);
    return at + 1;
  }
  const value = attached ?? argv[at + 1];
  if (value === undefined) throw new UsageError(`option ${shown} needs a value`);
  const read = option.type === 'number' ? readNumber(shown, value) : value;
  const wanted = STANDARD[name]?.rule?.(read);
  if (typeof wanted === 'string') {
    throw new UsageError(`option ${shown} must be ${wanted}, got ${JSON.stringify(value)}`);
  }
  values.push(read);
  return attached === undefined ? at + 2 : at + 1;
}

function readNumber(shown: string, text: string): number {
  const value = Number(text);
  if (text.trim() === '' || !Number.isFinite(value)) {
    throw new UsageError(`option ${shown} must be a number, got ${JSON.stringify(text)}`);
  }
  return value;
}

function finalValue(option: CliOption, given: (string | number | boolean)[] | undefined): unknown {
  if (option.type === 'boolean') return given !== undefined;
  if (option.multiple) return given ?? (option.default === undefined ? [] : [option.default]);
  return given?.[0] ?? option.default ?? null;
}

/**
 * What follows the subcommand. `start` takes every word as it is, since a supervisor in server mode sends the
 * requestor's words without a `--` before them; `run` names its command with `--entrypoint` or as the first word.
 */
function readWords(
  command: Subcommand,
  words: readonly string[],
): { readonly entryPoint: string | null; readonly args: readonly string[] } {
  if (command === 'start') return { entryPoint: null, args: words[0] === '--' ? words.slice(1) : words };
  let entryPoint: string | null = null;
  let at = 0;
  const args: string[] = [];
  while (at < words.length) {
    const word = words[at]!;
    at += 1;
    if (word === '--') {
      args.push(...words.slice(at));
      break;
    }
    const option = command === 'run' ? /^(?:--entrypoint|-e)(?:=([^]*))?$/.exec(word) : null;
    if (option) {
      if (entryPoint !== null) throw new UsageError('option --entrypoint was given twice');
      if (option[1] === undefined && words[at] === undefined)
        throw new UsageError('option --entrypoint needs a value');
      entryPoint = option[1] ?? words[at]!;
      if (option[1] === undefined) at += 1;
    } else if (word.startsWith('-') && word !== '-') {
      throw new UsageError(
        `unknown option ${word} after ${command}; options come before the subcommand, words that look like options after --`,
      );
    } else args.push(word);
  }
  if (command === 'run' && entryPoint === null) {
    const first = args.shift();
    if (first === undefined) throw new UsageError('run: not enough arguments; name what to run');
    entryPoint = first;
  }
  if ((command === 'test' || command === 'offer-template') && args.length > 0) {
    throw new UsageError(`${command} takes no words, got ${JSON.stringify(args[0])}`);
  }
  return { entryPoint, args };
}

function parseVolumeOverride(text: string | null): Readonly<Record<string, VolumeKind>> | null {
  if (text === null) return null;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new UsageError(`option --volume-override must be JSON, got ${JSON.stringify(text.slice(0, 80))}`);
  }
  if (!isObject(value)) throw new UsageError('option --volume-override must be a JSON object');
  for (const [path, kind] of Object.entries(value)) {
    const [name] = isObject(kind) && Object.keys(kind).length === 1 ? Object.keys(kind) : [];
    const body = name === undefined ? null : (kind as Record<string, unknown>)[name];
    const sized = name === 'ram' || name === 'storage';
    if (!isObject(body) || !(name === 'host' || (sized && ['string', 'number'].includes(typeof body.size)))) {
      throw new UsageError(
        `option --volume-override: ${path} must be {"host":{}}, {"ram":{"size":…}} or {"storage":{"size":…}}`,
      );
    }
  }
  return value as unknown as Readonly<Record<string, VolumeKind>>;
}
