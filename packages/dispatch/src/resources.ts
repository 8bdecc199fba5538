/**
 * Amounts of what a task takes of a node while it runs, and of what a node has to give: how they are written. What fits where
 * is `stores/fitting.ts`.
 */
import { MillraceError } from '@millrace/runner';

/**
 * By name: `cpu` in cores, `memory` in bytes, `gpu` in whole devices, or a name of one's own in units of one's own. Each above 0
 * and at most 2^53; `gpu` and `memory` are whole, the others multiples of 0.001. Never empty.
 */
export type Resources = Readonly<Record<string, number>>;

/** Names of one task or node. */
export const MAX_RESOURCES = 16;

const NAME = /^[a-z][a-z0-9._/-]{0,62}$/;

/** Those that come in whole pieces. */
const WHOLE: ReadonlySet<string> = new Set(['gpu', 'memory']);

const SIZE = /^(\d{1,16}(?:\.\d{1,3})?) ?(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)$/;
const SIZES: Readonly<Record<string, number>> = {
  B: 1,
  KiB: 1024,
  MiB: 1024 ** 2,
  GiB: 1024 ** 3,
  TiB: 1024 ** 4,
  kB: 1000,
  MB: 1000 ** 2,
  GB: 1000 ** 3,
  TB: 1000 ** 4,
};

export const RESOURCES_RULE = `must be an object of 1 to ${MAX_RESOURCES} names and amounts, such as {"cpu": 2, "memory": "512MiB"}`;

/**
 * Reads amounts out of a value from outside. Null: there are none (absent, null, or an empty object). `memory` may also be a
 * size such as `"512MiB"` or `"1.5 GB"`.
 *
 * @throws MillraceError `invalid_argument` naming the first wrong member in `details.name` (absent when the value as a whole is
 * wrong), with the rule as its message
 */
export function parseResources(value: unknown): Resources | null {
  if (value === undefined || value === null) return null;
  if (typeof value !== 'object' || Array.isArray(value)) throw refusal(RESOURCES_RULE);
  const entries = Object.entries(value);
  if (entries.length === 0) return null;
  if (entries.length > MAX_RESOURCES) throw refusal(RESOURCES_RULE);
  const amounts = entries.map(([name, given]): readonly [string, number] => {
    if (!NAME.test(name)) {
      throw refusal(
        'is no name of a resource: those are 1 to 63 characters of a-z, 0-9, ".", "_", "/" and "-", and begin with a letter',
        name,
      );
    }
    return [name, amountOf(name, given)];
  });
  // In one order, so that equal amounts are the same text however they were written.
  return Object.fromEntries(amounts.toSorted(([a], [b]) => (a < b ? -1 : 1)));
}

/**
 * Reads amounts as people write them on one line: `cpu=8,memory=32GiB,gpu=1`. Null: a blank text.
 *
 * @throws MillraceError `invalid_argument` like {@link parseResources}
 */
export function parseResourceList(text: string): Resources | null {
  if (text.trim() === '') return null;
  const amounts: Record<string, string | number> = {};
  for (const part of text.split(',')) {
    const [, name, amount] = /^\s*([^=\s]+)\s*=\s*(\S(?:.*\S)?)\s*$/.exec(part) ?? [];
    if (name === undefined || amount === undefined) {
      throw refusal(
        `must be a list such as cpu=8,memory=32GiB,gpu=1, and has the part ${JSON.stringify(part)}`,
      );
    }
    if (Object.hasOwn(amounts, name)) throw refusal('is named twice', name);
    amounts[name] = /^\d+(\.\d+)?$/.test(amount) ? Number(amount) : amount;
  }
  return parseResources(amounts);
}

/** As {@link parseResourceList} reads it, sizes in bytes. */
export function formatResources(resources: Resources): string {
  return Object.entries(resources)
    .map(([name, amount]) => `${name}=${amount}`)
    .join(',');
}

function amountOf(name: string, given: unknown): number {
  const amount = name === 'memory' && typeof given === 'string' ? sizeOf(given) : given;
  const whole = WHOLE.has(name);
  if (
    typeof amount === 'number' &&
    amount > 0 &&
    amount <= 2 ** 53 &&
    (whole ? Number.isInteger(amount) : Number(amount.toFixed(3)) === amount)
  ) {
    return amount;
  }
  throw refusal(
    name === 'memory'
      ? 'must be a whole number of bytes from 1 to 2^53, or a size such as "512MiB"'
      : whole
        ? 'must be a whole number from 1 to 2^53'
        : 'must be a multiple of 0.001, above 0 and at most 2^53',
    name,
  );
}

function sizeOf(text: string): number | null {
  const [, digits, unit] = SIZE.exec(text.trim()) ?? [];
  return digits === undefined || unit === undefined ? null : Number(digits) * (SIZES[unit] ?? Number.NaN);
}

function refusal(rule: string, name?: string): MillraceError {
  return new MillraceError('invalid_argument', rule, name === undefined ? {} : { details: { name } });
}
