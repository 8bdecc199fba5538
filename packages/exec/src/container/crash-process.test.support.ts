/** A node that says when its container runs, and is killed then. */
import { createTestContext } from '@millrace/runner/testing';
import { container } from './container.ts';

const { HOST = '', IMAGE = '', WORK_DIR = '' } = process.env;
const runner = container({
  capability: '/test/v1',
  image: IMAGE,
  command: ['sh', '-c', `echo '{"progress":1}' > $MILLRACE_EVENTS; while true; do sleep 0.1; done`],
  engine: { host: HOST },
  node: 'test-node',
  workDir: WORK_DIR,
  limits: { memoryMiB: 64, nproc: 1024 },
});
await runner.run(
  createTestContext({
    onCall: ({ method }) => {
      if (method === 'progress') process.stdout.write('up\n');
    },
  }),
);
