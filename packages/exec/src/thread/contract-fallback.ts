/**
 * `@millrace/runner` for modules that have none installed beside them, so that `millrace run ./my-runner.ts` works in
 * any folder: the copy this package uses. A copy of the module's own always comes first.
 */
import nodeModule, { createRequire, register } from 'node:module';

const CONTRACT = /^@millrace\/runner(?:\/|$)/;
const ours = createRequire(import.meta.url);

/** Whether a module at this path would not find `@millrace/runner` by itself. */
export function lacksContract(path: string): boolean {
  try {
    createRequire(path).resolve('@millrace/runner');
    return false;
  } catch {
    return true;
  }
}

/** Makes `import` and `require` of this thread find it. Only for a runner's thread: it changes how modules are found. */
export function provideContract(): void {
  register('./contract-hooks.js', import.meta.url);
  // Undocumented, and what every CommonJS loader (tsx's too) goes through.
  const commonJs = nodeModule as unknown as {
    _resolveFilename: (this: unknown, request: string, ...rest: unknown[]) => string;
  };
  const find = commonJs._resolveFilename;
  commonJs._resolveFilename = function (request, ...rest) {
    try {
      return find.call(this, request, ...rest);
    } catch (error) {
      if (!CONTRACT.test(request)) throw error;
      return ours.resolve(request);
    }
  };
}

interface ResolveContext {
  readonly parentURL?: string | undefined;
}
type Resolve = (specifier: string, context: ResolveContext) => Promise<{ readonly url: string }>;

/** The same for `import`; runs on Node's loader thread (see `contract-hooks.ts`). */
export async function resolveContract(
  specifier: string,
  context: ResolveContext,
  next: Resolve,
): Promise<{ readonly url: string }> {
  try {
    return await next(specifier, context);
  } catch (error) {
    if (!CONTRACT.test(specifier)) throw error;
    return await next(specifier, { ...context, parentURL: import.meta.url });
  }
}
