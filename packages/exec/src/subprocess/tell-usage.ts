import type { JsonObject, TaskContext } from '@millrace/runner';

/** To a node that asks it is told as what it is; else it is an event of kind `usage`. */
export async function tellUsage({ ctrl }: TaskContext, usage: JsonObject): Promise<void> {
  await (ctrl.usage === undefined ? ctrl.logEvent({ kind: 'usage', ...usage }) : ctrl.usage(usage));
}
