/** Frames for people: what a message says in one line, and its bytes. */
import type { Request, Response } from './messages.ts';

const SHOWN_TEXT = 120;
const BYTES_PER_LINE = 16;

/** One line, such as `id=3 run{bin:"/bin/echo",args:["echo","a"]}` or `event status{pid:1,running:true}`. */
export function describeRequest(request: Request): string {
  return `id=${request.id} ${describeCommand(request.command)}`;
}

/** As {@link describeRequest}, for what a runtime sends. */
export function describeResponse(response: Response): string {
  const head = response.event
    ? `event${response.id === 0n ? '' : ` id=${response.id}`}`
    : `id=${response.id}`;
  return `${head} ${describeCommand(response.command)}`;
}

/** The bytes in hex, sixteen to a line, each line behind `indent`. */
export function hexLines(bytes: Uint8Array, indent: string): string {
  const lines: string[] = [];
  for (let at = 0; at < bytes.length; at += BYTES_PER_LINE) {
    const line = [...bytes.subarray(at, at + BYTES_PER_LINE)].map((byte) =>
      byte.toString(16).padStart(2, '0'),
    );
    lines.push(indent + line.join(' '));
  }
  return lines.join('\n');
}

function describeCommand(command: Request['command'] | Response['command']): string {
  if (command.case === undefined) return '(no command)';
  return `${command.case}${describeValue(command.value)}`;
}

/** Like JSON with bare keys; members that hold their default are left out, as they are on the wire. */
function describeValue(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(shorten(value));
  if (value instanceof Uint8Array) return JSON.stringify(shorten(Buffer.from(value).toString('utf8')));
  if (Array.isArray(value)) return `[${value.map(describeValue).join(',')}]`;
  if (typeof value !== 'object' || value === null) return String(value);
  const members = Object.entries(value)
    .filter(([key, member]) => !key.startsWith('$') && !isDefault(member))
    .map(([key, member]) => (isOneof(member) ? describeOneof(member) : `${key}:${describeValue(member)}`));
  return `{${members.join(',')}}`;
}

function describeOneof(oneof: { readonly case: string; readonly value: unknown }): string {
  return `${oneof.case}:${describeValue(oneof.value)}`;
}

function isOneof(value: unknown): value is { readonly case: string; readonly value: unknown } {
  return typeof value === 'object' && value !== null && 'case' in value && typeof value.case === 'string';
}

function isDefault(value: unknown): boolean {
  if (value === undefined || value === '' || value === 0 || value === 0n || value === false) return true;
  if (value instanceof Uint8Array || Array.isArray(value)) return value.length === 0;
  if (typeof value !== 'object' || value === null) return false;
  return 'case' in value
    ? value.case === undefined
    : !('$typeName' in value) && Object.keys(value).length === 0;
}

function shorten(text: string): string {
  return text.length <= SHOWN_TEXT ? text : `${text.slice(0, SHOWN_TEXT)}… (${text.length} characters)`;
}
