/** Registers the `quickjs` engine: its artifacts are the text of one ECMAScript module whose default export is the compute. */
import { registerEngine } from '../engine.ts';
import { isolatedEngine } from '../isolated-engine.ts';
import type { PreparedJs } from './guest.ts';

/** Changes when the prelude, the QuickJS build or the prices of its fuel do. */
const VERSION = '1';

registerEngine(
  'quickjs',
  isolatedEngine({
    name: 'quickjs',
    guest: new URL('./guest.js', import.meta.url),
    version: `quickjs-${VERSION}`,
    // The memory start-up finds is part of how it comes out; how much fuel there is, is not.
    variant: (limits) => `${limits.maxMemoryMb},${limits.maxFuel === null ? 'free' : 'metered'}`,
    preparedBytes: (prepared) => (prepared as PreparedJs).image.blocks.byteLength,
  }),
);
