/** What Node's loader thread loads for `contract-fallback.ts`: its hooks are exports of a module. */
export { resolveContract as resolve } from './contract-fallback.ts';
