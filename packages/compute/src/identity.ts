/**
 * The `identity` engine: gives its input back, whatever the artifact. No sandbox, no limits, no metrics; it exists to
 * try the seam and what is built on it without a guest.
 */
import type { Engine, Instance } from './engine.ts';
import { registerEngine } from './engine.ts';

const EMPTY = new TextEncoder().encode('{}');

const instance: Instance = {
  invoke: (input) => Promise.resolve(input.byteLength === 0 ? EMPTY.slice() : input),
  close: () => Promise.resolve(),
};

const identity: Engine = {
  name: 'identity',
  load: () => Promise.resolve(instance),
  close: () => Promise.resolve(),
};

registerEngine('identity', () => identity);
