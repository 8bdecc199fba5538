/** What is refused before any engine is asked: options of an operator, meta of a task. */
import { MillraceError } from '@millrace/runner';
import type { Json, JsonObject } from '@millrace/runner';
import { taskSpec } from '@millrace/runner/model';
import { makeRunId } from '@millrace/runner/plugin';
import { expect, test } from 'vitest';
import { containerConfig } from './config.ts';
import { container } from './container.ts';
import type { ContainerOptions } from './container.ts';
import { containerExtras, containerKindOf } from './container-kind.ts';
import { containerRunner } from './generic.ts';
import { DEFAULT_CONTAINER_LIMITS, checkContainerLimits, lowerContainerLimits } from './limits.ts';

const options = { capability: '/test/v1', image: 'debian:12', engine: { host: 'unix:///nowhere' } };

test.each<[Partial<ContainerOptions>, RegExp]>([
  [{ image: '' }, /image: container image cannot be empty/],
  [{ requireDigest: true }, /image debian:12 must be named by its digest/],
  [{ command: [] }, /command cannot be empty/],
  [{ args: ['{nonsense}'] }, /args\[0\]: \{nonsense\} is no placeholder/],
  [{ args: ['{input:a}'], inputs: ['b'] }, /args use \{input:a\}, which is not one of inputs \(b\)/],
  [{ args: ['{meta:size}'], params: {} }, /args use \{meta:size\}, which params do not declare/],
  [{ inputs: ['../a'] }, /inputs\[0\] "..\/a" must be a file name/],
  [{ outputs: ['../*'] }, /outputs\[0\] .* must not have empty, "." or ".." segments/],
  [{ env: { MILLRACE_X: '1' } }, /env.MILLRACE_X must not be one of MILLRACE_\*/],
  [{ workdir: 'relative' }, /workdir must be an absolute path in the container/],
  [{ tmpfs: { '/task/out': 1 } }, /tmpfs: \/task\/out must not be in \/task/],
  [{ tmpfs: { '/a/../b': 1 } }, /tmpfs: \/a\/..\/b must be an absolute path/],
  [{ tmpfs: { '/a': 0.5 } }, /tmpfs: \/a must have a size of a whole number of MiB, got 0.5/],
  [{ user: 'a b' }, /user must be UID, UID:GID or a name, got "a b"/],
  [{ stopSignal: 'TERM; rm' }, /stopSignal must be a name such as SIGTERM/],
  [{ limits: { memoryMiB: 5 } }, /limits.memoryMiB must be a whole number of at least 6, got 5/],
  [{ workDir: '/a:b' }, /workDir \/a:b must not contain ":"/],
  [{ engine: { host: 'ssh://host' } }, /container engine host "ssh:\/\/host" must be unix/],
])('%j is refused by name', (change, message) => {
  expect(() => container({ ...options, ...change })).toThrow(message);
});

test('the generic runner is nothing without a list of images', () => {
  for (const allow of [[], ['']]) {
    expect(() => containerRunner({ ...options, allow })).toThrow(
      /allow must list the images that tasks may run/,
    );
  }
});

test.each<[Json, RegExp]>([
  [null, /^meta: must be an object/],
  [{}, /^meta.image: container image cannot be empty/],
  [{ image: 'A B' }, /^meta.image must be an image reference/],
  [{ container: { image: 'a', comand: [] } }, /^meta.container.comand: is unknown/],
  [{ container: { image: 'a' }, image: 'a' }, /^meta.image: is unknown/],
  [{ image: 'a', command: 'sh' }, /^meta.command must be an array, got "sh"/],
  [{ image: 'a', command: [' '] }, /^meta.command\[0\]: container command cannot be empty/],
  [{ image: 'a', args: [1] }, /^meta.args\[0\] must be a string, got 1/],
  [{ image: 'a', env: { '1A': 'x' } }, /^meta.env.1A must be named by letters/],
  [{ image: 'a', env: [{ key: 'A' }] }, /^meta.env\[0\] must be a string/],
  [{ image: 'a', workdir: 'x' }, /^meta.workdir: must be an absolute path, got "x"/],
  [{ image: 'a', inputs: ['x', 'x'] }, /^meta.inputs\[1\] "x" is there twice/],
  [{ image: 'a', network: 'yes' }, /^meta.network: must be true or false, got "yes"/],
  [{ image: 'a', privileged: true }, /^meta.privileged: is unknown/],
])('meta %j is refused by name', (meta, message) => {
  const parse = (): unknown => containerKindOf(meta);
  expect(parse).toThrow(MillraceError);
  expect(parse).toThrow(message);
});

test('empty lists of meta mean those of the image, and the last entry of a variable wins', () => {
  const kind = containerKindOf({
    image: 'a',
    command: [],
    args: [],
    env: [
      { key: 'A', value: '1' },
      { key: 'A', value: '2' },
    ],
    traceparent: 'x',
  });
  expect(kind).toMatchObject({ command: null, args: [], env: [{ key: 'A', value: '2' }], extensions: {} });
  expect(containerExtras(kind, 'meta')).toMatchObject({ inputs: null, outputs: [], network: false });
});

test("the plugin of containers takes its kind only, and refuses by the operator's rules when it builds", () => {
  const { plugin } = containerRunner({ ...options, capability: '/exec/container/v1', allow: ['debian:12'] });
  const build =
    (image: string, extensions: JsonObject = {}): (() => unknown) =>
    () =>
      plugin.buildTask(
        taskSpec({
          slot: 's',
          timeoutMs: 1,
          kind: { type: 'container', image, command: null, args: [], env: [], extensions },
        }),
        { env: [], metrics: { recordRunnerError: () => undefined } },
        makeRunId(plugin.name, 's'),
      );
  expect(plugin.name).toBe('container');
  expect(build('debian:12')()).toMatchObject({ name: expect.stringMatching(/^container-s-\d+$/) as string });
  expect(build('debian:11')).toThrow(/^invalid specification: image debian:11 is not allowed on this node/);
  expect(build('debian:12', { network: true })).toThrow(/containers have no network on this node/);
  expect(() =>
    plugin.buildTask(
      taskSpec({ slot: 's', timeoutMs: 1, kind: { type: 'embedded' } }),
      { env: [], metrics: { recordRunnerError: () => undefined } },
      makeRunId(plugin.name, 's'),
    ),
  ).toThrow("unsupported task kind for runner 'container': embedded");
});

test('limits are on by default, may be fractions of a processor only, and a task may only lower them', () => {
  expect(checkContainerLimits('limits', undefined)).toEqual(DEFAULT_CONTAINER_LIMITS);
  expect(checkContainerLimits('limits', { cpus: 0.01, memoryMiB: 6, wallMs: undefined })).toMatchObject({
    cpus: 0.01,
    memoryMiB: 6,
  });
  for (const bad of [
    { cpus: 0.009 },
    { memoryMiB: 6.5 },
    { pids: 0 },
    { wallMs: Infinity },
    { nofile: '64' },
    { memory: 1 },
    [],
  ]) {
    expect(() => checkContainerLimits('limits', bad)).toThrow(/^limits/);
  }
  const allowed = checkContainerLimits('limits', { memoryMiB: 100 });
  expect(lowerContainerLimits('meta.limits', allowed, { memoryMiB: 100 })).toEqual(allowed);
  expect(() => lowerContainerLimits('meta.limits', allowed, { memoryMiB: 101 })).toThrow(
    'meta.limits.memoryMiB must be at most 100, which is what this node allows, got 101',
  );
});

test('a container is closed but for what is asked for', () => {
  const parts = {
    imageId: 'sha256:1',
    volumes: ['/data', '/cache'],
    command: null,
    args: null,
    env: { A: 'b=c' },
    labels: {},
    user: '1:1',
    workdir: null,
    stopSignal: 'SIGTERM',
    network: false,
    readOnlyRoot: true,
    tmpfs: new Map([['/cache', 5]]),
    limits: { ...DEFAULT_CONTAINER_LIMITS, memoryMiB: 10, cpus: 0.5, nproc: 0 },
    folders: { inputs: '/i', outputs: '/o', events: '/e' },
  };
  const config = containerConfig(parts);
  expect(config).not.toHaveProperty('Entrypoint');
  expect(config).not.toHaveProperty('Cmd');
  expect(config).toMatchObject({ NetworkDisabled: true, Env: ['A=b=c'], Healthcheck: { Test: ['NONE'] } });
  expect(config.HostConfig).toMatchObject({
    NetworkMode: 'none',
    ReadonlyRootfs: true,
    Privileged: false,
    CapDrop: ['ALL'],
    SecurityOpt: ['no-new-privileges'],
    Memory: 10 * 1024 ** 2,
    MemorySwap: 10 * 1024 ** 2,
    NanoCpus: 500_000_000,
    PidsLimit: 512,
    LogConfig: { Type: 'none' },
    Binds: ['/i:/task/in:ro,z', '/o:/task/out:rw,z', '/e:/task/events:rw,z'],
    Mounts: [
      { Type: 'tmpfs', Target: '/data', TmpfsOptions: { SizeBytes: 64 * 1024 ** 2 } },
      { Type: 'tmpfs', Target: '/cache', TmpfsOptions: { SizeBytes: 5 } },
    ],
  });
  expect((config.HostConfig['Ulimits'] as { Name: string }[]).map(({ Name }) => Name)).toEqual([
    'nofile',
    'fsize',
    'core',
  ]);
  for (const open of ['PidMode', 'Devices', 'CapAdd', 'VolumesFrom', 'UsernsMode', 'ExtraHosts']) {
    expect(config.HostConfig).not.toHaveProperty(open);
  }
  expect(containerConfig({ ...parts, network: true }).HostConfig['NetworkMode']).toBe('default');
});
