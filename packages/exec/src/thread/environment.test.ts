import { expect, test } from 'vitest';
import { taskEnvironment } from './environment.ts';

test('a task sees the harmless variables and what it was granted, and nothing else', () => {
  const node = {
    PATH: '/bin',
    TZ: 'UTC',
    NODE_ENV: undefined,
    SECP256K1_PRIVHEX: 'secret',
    NODE_OPTIONS: '--x',
  };
  expect(taskEnvironment(node)).toEqual({ PATH: '/bin', TZ: 'UTC' });
  expect(taskEnvironment(node, { TOKEN: 't', TZ: 'CET' })).toEqual({ PATH: '/bin', TZ: 'CET', TOKEN: 't' });
});
