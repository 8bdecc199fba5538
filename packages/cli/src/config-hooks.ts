/**
 * How modules are found once a config file is code (see `config-module.ts`). Runs on Node's loader thread, in front of tsx's
 * own hooks.
 */

/** This program and what it is made of. */
const LENT = /^(?:millrace|@millrace\/(?:compute|dispatch|exec|node|runner|runtime))(?:\/|$)/;

interface Resolved {
  readonly url: string;
  readonly format?: string | null | undefined;
}
interface ResolveContext {
  readonly parentURL?: string | undefined;
}
type Resolve = (specifier: string, context: ResolveContext) => Promise<Resolved>;

export async function resolve(specifier: string, context: ResolveContext, next: Resolve): Promise<Resolved> {
  let found: Resolved;
  try {
    found = await next(specifier, context);
  } catch (error) {
    if (!LENT.test(specifier)) throw error;
    found = await next(specifier, { ...context, parentURL: import.meta.url });
  }
  const { pathname } = new URL(found.url);
  const isOurs = pathname.endsWith('.ts') && !pathname.includes('/node_modules/');
  return isOurs && found.format === 'commonjs' ? { ...found, format: 'module' } : found;
}
