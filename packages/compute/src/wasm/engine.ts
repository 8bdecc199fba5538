/** Registers the `wasm` engine, also under the reference's name `wazero`, so that its manifests work. */
import { registerEngine } from '../engine.ts';
import { isolatedEngine } from '../isolated-engine.ts';

/** Changes when the rewriter or what is granted to guests does. */
const VERSION = '1';

for (const name of ['wasm', 'wazero']) {
  registerEngine(
    name,
    isolatedEngine({
      name,
      guest: new URL('./guest.js', import.meta.url),
      version: `wasm-${VERSION}`,
      variant: (limits) =>
        [
          limits.maxMemoryMb,
          limits.maxTableEntries,
          limits.maxFunctions,
          limits.maxImports,
          limits.maxFuel !== null,
        ].join(','),
    }),
  );
}
