/**
 * Names of lanes, submissions and agents. They become names of folders and control groups, arguments and log fields, so
 * only harmless characters are in them.
 */
import { invalidModel } from './errors.ts';

/** A logical lane of execution, the same over submissions: at most one task of a slot runs at a time. */
export type Slot = string;

/** One submission; normally its run id. */
export type TaskId = string;

/** One agent process. */
export type AgentId = string;

export const MAX_SLOT_LENGTH = 64;
export const MAX_TASK_ID_LENGTH = 256;
export const MAX_AGENT_ID_LENGTH = 128;

/** @throws MillraceError `invalid_argument` unless it is 1 to 64 of `A-Z a-z 0-9 . _ -`, and neither `.` nor `..` */
export function checkSlot(slot: Slot, path = 'slot'): void {
  checkIdentity('slot', slot, MAX_SLOT_LENGTH, path);
}

/** @throws as {@link checkSlot}, with 256 characters. */
export function checkTaskId(id: TaskId, path = 'id'): void {
  checkIdentity('task id', id, MAX_TASK_ID_LENGTH, path);
}

/** @throws as {@link checkSlot}, with 128 characters. */
export function checkAgentId(id: AgentId, path = 'agentId'): void {
  checkIdentity('agent id', id, MAX_AGENT_ID_LENGTH, path);
}

function checkIdentity(what: string, text: string, maxLength: number, path: string): void {
  if (text === '') throw invalidModel(path, `${what} cannot be empty`);
  if (!/^[A-Za-z0-9._-]+$/.test(text) || text === '.' || text === '..') {
    throw invalidModel(
      path,
      `${what} must be letters, digits, ".", "_" or "-" and neither "." nor "..", got ${JSON.stringify(text.slice(0, 80))}`,
    );
  }
  if (text.length > maxLength) {
    throw invalidModel(path, `${what} must be at most ${maxLength} characters, got ${text.length}`);
  }
}
