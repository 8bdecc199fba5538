/** Registers the `wasm` engine, also under the reference's name `wazero`, so that its manifests work. */
import { registerEngine } from '../engine.ts';
import type { Plugin } from '../engine.ts';
import { refOf, verifyArtifact } from '../artifact.ts';
import { isolatedEngine } from '../isolated-engine.ts';
import type { Library } from '../pool/guest-engine.ts';
import { readModule } from './module.ts';
import { readPluginFace } from './plugin.ts';

/** Changes when the rewriter or what is granted to guests does. */
const VERSION = '1';

for (const name of ['wasm', 'wazero']) {
  registerEngine(
    name,
    isolatedEngine({
      name,
      guest: new URL('./guest.js', import.meta.url),
      version: `wasm-${VERSION}`,
      libraries: (config) => (config.plugins ?? []).map(checkedPlugin),
      variant: ({ maxMemoryMb, maxTableEntries, maxFunctions, maxImports, maxFuel }) =>
        `${maxMemoryMb},${maxTableEntries},${maxFunctions},${maxImports},${maxFuel !== null}`,
    }),
  );
}

/** Its own bytes, not the caller's, and a plugin indeed: whoever configured it should hear of a mistake, not a compute. */
function checkedPlugin({ bytes, digest }: Plugin): Library {
  const ref = { ...refOf(bytes), digest: digest.replace(/^sha256:/, '') };
  const { wasm } = verifyArtifact(ref, { ...ref, engine: 'plugin', wasm: bytes }, Number.MAX_SAFE_INTEGER);
  readPluginFace(readModule(wasm, { maxFunctions: Infinity, maxImports: Infinity }));
  return { digest: ref.digest, bytes: wasm };
}
