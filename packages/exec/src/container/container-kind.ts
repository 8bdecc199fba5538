/**
 * A task's `meta` as the task kind "container": what a requestor writes to have any allowed image run.
 *
 *     {"image": "debian:12", "command": ["sha256sum"], "args": ["{input:photo.jpg}"],
 *      "env": [{"key": "TZ", "value": "UTC"}], "inputs": ["photo.jpg"], "outputs": ["*.txt"]}
 *
 * All of it may stand under a member `container`. Unknown members are refused, so that a misspelt one is not silently ignored.
 */
import type { Json, JsonObject } from '@millrace/runner';
import { checkInputNames } from '../subprocess/inputs.ts';
import {
  TRACE,
  boolean,
  invalid,
  object,
  onlyMembers,
  parseEnv,
  string,
  strings,
} from '../subprocess/subprocess-kind.ts';
import { parseImage } from './image-reference.ts';
import type { ImageReference } from './image-reference.ts';

export interface ContainerKind {
  readonly image: ImageReference;
  /** Null: the image's entry point. */
  readonly command: readonly string[] | null;
  /** Null: the image's command. */
  readonly args: readonly string[] | null;
  readonly env: Readonly<Record<string, string>>;
  readonly workdir: string | null;
  readonly failOnNonZero: boolean;
  /** Null: the names they are stored by. */
  readonly inputs: readonly string[] | null;
  readonly outputs: readonly string[];
  readonly limits: JsonObject;
  /** Asks for a network. */
  readonly network: boolean;
}

const MEMBERS = [
  'image',
  'command',
  'args',
  'env',
  'workdir',
  'failOnNonZero',
  'inputs',
  'outputs',
  'limits',
  'network',
];

/** @throws MillraceError `invalid_argument`, naming the member by its path, the rule and the value. */
export function parseContainerKind(meta: Json): ContainerKind {
  const outer = object('meta', meta);
  const wrapped = outer['container'] !== undefined;
  const at = wrapped ? 'meta.container' : 'meta';
  const kind = wrapped ? object(at, outer['container']!) : outer;
  onlyMembers(at, kind, wrapped ? MEMBERS : [...MEMBERS, ...TRACE]);
  if (wrapped) onlyMembers('meta', outer, ['container', ...TRACE]);
  const { command, args, workdir, failOnNonZero, inputs, outputs, limits, network } = kind;
  // An empty list is an absent one, as the field's other wire format has it.
  const commandLine = command == null ? [] : strings(`${at}.command`, command);
  if (commandLine[0]?.trim() === '') throw invalid(`${at}.command[0]`, 'container command cannot be empty');
  const argList = args == null ? [] : strings(`${at}.args`, args);
  const inputNames = inputs == null ? null : strings(`${at}.inputs`, inputs);
  if (inputNames !== null) checkInputNames(`${at}.inputs`, inputNames);
  return {
    image: parseImage(kind['image'] ?? '', `${at}.image`),
    command: commandLine.length === 0 ? null : commandLine,
    args: argList.length === 0 ? null : argList,
    env: parseEnv(`${at}.env`, kind['env'] ?? []),
    workdir: workdir == null ? null : parseWorkdir(`${at}.workdir`, string(`${at}.workdir`, workdir)),
    failOnNonZero: failOnNonZero == null ? true : boolean(`${at}.failOnNonZero`, failOnNonZero),
    inputs: inputNames,
    outputs: outputs == null ? [] : strings(`${at}.outputs`, outputs),
    limits: limits == null ? {} : object(`${at}.limits`, limits),
    network: network == null ? false : boolean(`${at}.network`, network),
  };
}

function parseWorkdir(at: string, path: string): string {
  if (!path.startsWith('/') || /\p{Cc}/u.test(path))
    throw invalid(at, `must be an absolute path, got ${JSON.stringify(path.slice(0, 100))}`);
  return path;
}
