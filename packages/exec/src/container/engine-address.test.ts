import { expect, test } from 'vitest';
import { parseEngineHost } from './engine-address.ts';

test.each([
  [
    'unix:///run/podman/podman.sock',
    '/run/podman/podman.sock',
    'http://engine',
    'unix:///run/podman/podman.sock',
  ],
  ['/run/docker.sock', '/run/docker.sock', 'http://engine', 'unix:///run/docker.sock'],
  ['tcp://127.0.0.1:2375', null, 'http://127.0.0.1:2375', 'tcp://127.0.0.1:2375'],
  ['http://[::1]:2375/', null, 'http://[::1]:2375', 'tcp://[::1]:2375'],
])('%s is an engine', (text, socketPath, origin, host) => {
  expect(parseEngineHost(text)).toEqual({ origin, socketPath, host });
});

test.each([
  '',
  'unix://',
  'unix:///',
  'unix://relative',
  'ssh://host',
  'npipe:////./pipe/docker',
  'https://h:1',
  'fd://',
])('%j is refused, and what to do instead is said', (text) => {
  expect(() => parseEngineHost(text)).toThrow(/must (be unix:\/\/\/path or tcp|name a socket file)/);
});

test.each(['tcp://host', 'tcp://host:1/path', 'tcp://user@host:1', 'http://host:1?x'])(
  '%s must be host and port only',
  (text) => {
    expect(() => parseEngineHost(text)).toThrow(/must be a host and a port only/);
  },
);
