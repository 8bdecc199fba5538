/**
 * Imports a config file that is code. It shares this process with the node, and so it has to share its packages: a second copy of
 * `@millrace/exec` would examine sandboxes twice, and of some libraries below it there can be only one.
 *
 * - TypeScript is always an ES module. Without `"type": "module"` near it, it would be CommonJS to tsx, which loads packages a
 *   second time then.
 * - What a config imports of this program is found also where nothing is installed beside it, as after `npm install --global millrace`. A
 *   copy of its own comes first.
 */
import { register } from 'node:module';
import { pathToFileURL } from 'node:url';

let registered = false;
let knowsTypeScript = false;

/** @param file Absolute path of a `.ts`, `.mts`, `.js` or `.mjs` file. @throws what the file throws */
export async function importConfig(file: string): Promise<{ readonly default?: unknown }> {
  if (file.endsWith('ts') && !knowsTypeScript) {
    knowsTypeScript = true;
    // Only a TypeScript config pays for loading the compiler.
    const tsx = await import('tsx/esm/api');
    tsx.register();
    registered = false;
  }
  // The last ones are asked first.
  if (!registered) register('./config-hooks.js', import.meta.url);
  registered = true;
  return (await import(pathToFileURL(file).href)) as { readonly default?: unknown };
}
