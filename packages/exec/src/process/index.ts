/** For packages that start programs their own way: whatever came from one, found and ended. */
export { ProcessTree } from './process-tree.ts';
export type { ProcessTreeOptions, TreeMember } from './process-tree.ts';
export type { ProcessId, ProcessStat } from './proc.ts';
