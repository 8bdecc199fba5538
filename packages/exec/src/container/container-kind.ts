/**
 * A task's `meta` as the task kind "container": what a requestor writes to have any allowed image run.
 *
 *     {"image": "debian:12", "command": ["sha256sum"], "args": ["{input:photo.jpg}"],
 *      "env": [{"key": "TZ", "value": "UTC"}], "inputs": ["photo.jpg"], "outputs": ["*.txt"]}
 *
 * All of it may stand under a member `container`. Unknown members are refused, so that a misspelt one is not silently ignored.
 * `image`, `command`, `args` and `env` are the model's, the others extensions to it.
 */
import type { Json, JsonObject } from '@millrace/runner';
import { parseContainer, type ContainerKind } from '@millrace/runner/model';
import { checkInputNames } from '../subprocess/inputs.ts';
import {
  BESIDE,
  boolean,
  checkEnvNames,
  envList,
  invalid,
  object,
  onlyMembers,
  present,
  string,
  strings,
  without,
} from '../subprocess/subprocess-kind.ts';
import { parseImage } from './image-reference.ts';
import type { ImageReference } from './image-reference.ts';

/** What the model has no rules for, and its image taken apart. */
export interface ContainerExtras {
  readonly image: ImageReference;
  readonly workdir: string | null;
  readonly failOnNonZero: boolean;
  /** Null: the names they are stored by. */
  readonly inputs: readonly string[] | null;
  readonly outputs: readonly string[];
  readonly limits: JsonObject;
  /** Asks for a network. */
  readonly network: boolean;
}

const EXTENSIONS = ['workdir', 'failOnNonZero', 'inputs', 'outputs', 'limits', 'network'];
const MEMBERS = ['image', 'command', 'args', 'env', ...EXTENSIONS];

/** @throws MillraceError `invalid_argument`, naming the member by its path, the rule and the value. */
export function containerKindOf(meta: Json): ContainerKind {
  const outer = object('meta', meta);
  const wrapped = outer['container'] !== undefined;
  const at = wrapped ? 'meta.container' : 'meta';
  const raw = wrapped ? object(at, outer['container']!) : outer;
  onlyMembers(at, raw, wrapped ? MEMBERS : [...MEMBERS, ...BESIDE]);
  if (wrapped) onlyMembers('meta', outer, ['container', ...BESIDE]);
  parseImage(raw['image'] ?? '', `${at}.image`);
  const kind = parseContainer(
    present({ ...without(raw, BESIDE), env: envList(`${at}.env`, raw['env']) }),
    at,
  );
  containerExtras(kind, at);
  return kind;
}

/** @throws MillraceError `invalid_argument`, naming the member below `at`. */
export function containerExtras(kind: ContainerKind, at: string): ContainerExtras {
  const { workdir, failOnNonZero, inputs, outputs, limits, network } = kind.extensions;
  onlyMembers(at, kind.extensions, EXTENSIONS);
  checkEnvNames(`${at}.env`, kind.env);
  if (kind.command?.[0]?.trim() === '')
    throw invalid(`${at}.command[0]`, 'container command cannot be empty');
  const inputNames = inputs == null ? null : strings(`${at}.inputs`, inputs);
  if (inputNames !== null) checkInputNames(`${at}.inputs`, inputNames);
  return {
    image: parseImage(kind.image, `${at}.image`),
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
