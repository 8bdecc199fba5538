/** A node to be killed: runs one endless program in the tier named, and says so once it runs. Started by a test. */
import { createTestContext } from '@millrace/runner/testing';
import type { SandboxTier } from '../sandbox/controls.ts';
import { subprocess } from './subprocess.ts';

const [, , tier, cgroup, token, workDir] = process.argv as [
  string,
  string,
  SandboxTier,
  'auto' | 'off',
  string,
  string,
];
const runner = subprocess({
  capability: '/test/v1',
  command: 'sh',
  args: ['-c', `setsid sleep ${token} & (setsid sh -c "sleep ${token} & sleep ${token}" &); sleep ${token}`],
  sandbox: { tier, cgroup },
  workDir,
});
process.stdout.write('running\n');
await runner.run(createTestContext());
