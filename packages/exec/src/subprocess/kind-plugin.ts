/** What the plugins of programs and of containers have in common. */
import { MillraceError } from '@millrace/runner';
import { mergeEnv, type TaskEnv } from '@millrace/runner/model';
import type { PluginContext } from '@millrace/runner/plugin';
import { checkEnvNames } from './subprocess-kind.ts';

/** @throws MillraceError `permission_denied`, naming the variable. */
export function checkAllowedEnv(env: TaskEnv, allowed: readonly string[]): void {
  const refused = env.find(({ key }) => !allowed.includes(key) && !allowed.includes('*'));
  if (refused === undefined) return;
  throw new MillraceError(
    'permission_denied',
    `meta.env: variable ${refused.key} is not allowed on this node; allowed: ${allowed.join(', ') || 'none'}`,
  );
}

/** What the router lends, as far as it can be in an environment. */
export function lentEnvironment({ env }: PluginContext): Readonly<Record<string, string>> {
  checkEnvNames('env', env);
  return mergeEnv([], env);
}
