import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { expect, test } from 'vitest';
import { readStat } from '../process/proc.ts';
import { isGone, ownerLabels, ownerOf, thisProcess } from './owner.ts';
import type { Owner } from './owner.ts';

const self = thisProcess('node-1');

async function ownerThatEnded(): Promise<Owner> {
  const child = spawn('cat', { stdio: ['pipe', 'ignore', 'ignore'] });
  const owner = { ...self, pid: String(child.pid), started: readStat(child.pid!)?.started ?? '' };
  const ended = once(child, 'exit');
  child.stdin.end();
  await ended;
  return owner;
}

test('an owner survives being written as labels', () => {
  expect(ownerOf(ownerLabels(self))).toEqual(self);
});

test('a process that has ended is gone, and one that lives is not', async () => {
  const child = spawn('cat', { stdio: ['pipe', 'ignore', 'ignore'] });
  const living = { ...self, pid: String(child.pid), started: readStat(child.pid!)!.started };
  expect(isGone(living, self, false)).toBe(false);
  // Its pid, used again.
  expect(isGone({ ...living, started: '1' }, self, false)).toBe(true);
  const ended = once(child, 'exit');
  child.stdin.end();
  await ended;
  expect(isGone(living, self, false)).toBe(true);
});

test('this process is never gone, not even to the only one of its node', () => {
  expect(isGone(self, self, false)).toBe(false);
  expect(isGone(self, self, true)).toBe(false);
});

test('of another node, host or pid namespace nothing is certain', async () => {
  const ended = await ownerThatEnded();
  expect(isGone({ ...ended, node: 'node-2' }, self, true)).toBe(false);
  expect(isGone({ ...ended, host: 'elsewhere' }, self, false)).toBe(false);
  expect(isGone({ ...ended, pidNamespace: 'pid:[1]' }, self, false)).toBe(false);
  expect(isGone({ ...ended, pid: '' }, self, false)).toBe(false);
  expect(isGone(ownerOf({ 'millrace.node': 'node-1' }), self, false)).toBe(false);
});

test('what another host or pid namespace owns is gone when only one process has this node id', () => {
  expect(isGone({ ...self, host: 'elsewhere' }, self, true)).toBe(true);
  expect(isGone({ ...self, pidNamespace: 'pid:[1]' }, self, true)).toBe(true);
});

test('everything of an earlier boot is gone', () => {
  expect(isGone({ ...self, boot: 'earlier' }, self, false)).toBe(true);
});
