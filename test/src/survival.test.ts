/**
 * The main job survives what machines do: a node, or the dispatcher, is killed in the middle, and the artifacts are the
 * same to the byte, each task accepted once.
 */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { JobDetail, JobEvent, Requestor } from '@millrace/dispatch/client';
import { buildJob } from '@millrace-examples/world-map/job';
import { planMap } from '@millrace-examples/world-map/plan';
import {
  closing,
  nodeCredentials,
  requestor,
  startDispatcher,
  startNode,
  temporaryFolder,
  type NodeEnvironment,
  type Program,
  type RunningDispatcher,
} from './system.ts';

const RUNNERS = ['prepare', 'tile', 'stitch'].map((name) =>
  fileURLToPath(import.meta.resolve(`@millrace-examples/world-map/runners/${name}`)),
);
const ATLAS = createRequire(import.meta.url).resolve('world-atlas/countries-50m.json');
/** Small tiles, but enough of them that a kill lands in the middle. */
const PLAN = planMap(2048, { columns: 8, rows: 4 }, false);

interface Scene extends AsyncDisposable {
  dispatcher: RunningDispatcher;
  readonly dataDir: string;
  readonly nodes: { readonly env: NodeEnvironment; readonly workDir: string; program: Program }[];
}

/** A dispatcher over a folder and two nodes that can do the job. */
async function openScene(): Promise<Scene> {
  const folder = await temporaryFolder();
  const dataDir = path.join(folder.path, 'data');
  const dispatcher = await startDispatcher(dataDir);
  const scene: Scene = {
    dispatcher,
    dataDir,
    nodes: [],
    async [Symbol.asyncDispose]() {
      await Promise.all(scene.nodes.map(({ program }) => program.kill('SIGKILL')));
      await scene.dispatcher.program.kill('SIGKILL');
      await folder[Symbol.asyncDispose]();
    },
  };
  for (const name of ['one', 'two']) {
    const env = await nodeCredentials(dispatcher, name);
    const workDir = path.join(folder.path, name);
    scene.nodes.push({ env, workDir, program: await startNode(dispatcher, env, RUNNERS, { workDir }) });
  }
  return scene;
}

let maps = 0;

async function submitMap(client: Requestor): Promise<string> {
  const atlas = await readFile(ATLAS);
  // Names are unique in a domain, and each map brings its own.
  maps += 1;
  const id = await client.upload(atlas, { name: `atlas-${maps}` });
  return await client.submit(buildJob(PLAN, { atlas: id, overlay: null }));
}

/** Follows a job to its end; `onEvent` may act in between. */
async function follow(
  client: Requestor,
  id: string,
  onEvent: (event: JobEvent) => Promise<void> | void = () => {},
): Promise<JobEvent[]> {
  const events: JobEvent[] = [];
  for await (const event of client.events(id)) {
    events.push(event);
    await onEvent(event);
  }
  return events;
}

/** The digest of every artifact, by the label of its task and its logical path. */
async function artifacts(client: Requestor, detail: JobDetail): Promise<Map<string, string>> {
  const digests = new Map<string, string>();
  for (const task of detail.tasks) {
    const receipt = detail.receipts.find(
      ({ task_id, outcome }) => task_id === task.id && outcome === 'completed',
    );
    const { artifacts: reports } = receipt!.meta as unknown as {
      artifacts: { logical_path: string; id: string }[];
    };
    for (const { logical_path, id } of reports) {
      const { body } = await client.storage.openRaw(detail.job.domain_id, id);
      const hash = createHash('sha256');
      for await (const chunk of body) hash.update(chunk as Buffer);
      digests.set(`${task.label} ${logical_path}`, hash.digest('hex'));
    }
  }
  return digests;
}

/** What holds however rough the way was. */
function expectEachAcceptedOnce(detail: JobDetail, events: readonly JobEvent[]): void {
  expect(detail.job.status).toBe('completed');
  for (const task of detail.tasks) {
    expect(task.status).toBe('completed');
    const completions = (kind: string): number =>
      events.filter((event) => event.task_id === task.id && event.kind === kind).length;
    expect(completions('task.completed'), task.label).toBe(1);
    expect(
      detail.receipts.filter(({ task_id, outcome }) => task_id === task.id && outcome === 'completed'),
      task.label,
    ).toHaveLength(1);
  }
  expect(events.map(({ seq }) => seq)).toEqual(events.map((_, index) => index + 1));
}

/** Calls `act` once, when `count` tiles are done. */
function afterTiles(count: number, act: () => Promise<void>): (event: JobEvent) => Promise<void> {
  // The first stage completes first.
  let left = count + 1;
  return async (event) => {
    if (event.kind !== 'task.completed') return;
    left -= 1;
    if (left === 0) await act();
  };
}

describe('the world map', () => {
  let undisturbed: Map<string, string>;
  let scene: Scene;

  beforeAll(async () => {
    scene = await openScene();
    await using client = closing(requestor(scene.dispatcher));
    const id = await submitMap(client.value);
    const events = await follow(client.value, id);
    const detail = await client.value.job(id);
    expectEachAcceptedOnce(detail, events);
    undisturbed = await artifacts(client.value, detail);
  }, 180_000);

  afterAll(async () => {
    await scene?.[Symbol.asyncDispose]();
  });

  test('comes out the same when a node is killed in the middle', { timeout: 180_000 }, async () => {
    await using client = closing(requestor(scene.dispatcher));
    const id = await submitMap(client.value);
    const victim = scene.nodes[0]!;
    const events = await follow(
      client.value,
      id,
      afterTiles(6, () => victim.program.kill('SIGKILL')),
    );
    const detail = await client.value.job(id);
    expectEachAcceptedOnce(detail, events);
    expect(await artifacts(client.value, detail)).toEqual(undisturbed);
    // It held a task when it died, unless the kill fell between two; the dispatcher took that one back.
    const expired = events.filter(({ kind }) => kind === 'task.expired').length;
    expect(detail.tasks.reduce((sum, task) => sum + task.node_faults, 0)).toBe(expired);
    expect(detail.tasks.every((task) => task.attempts === 1)).toBe(true);
    victim.program = await startNode(scene.dispatcher, victim.env, RUNNERS, { workDir: victim.workDir });
  });

  test(
    'comes out the same when the dispatcher is killed and started again',
    { timeout: 180_000 },
    async () => {
      const port = Number(new URL(scene.dispatcher.url).port);
      await using client = closing(requestor(scene.dispatcher));
      const id = await submitMap(client.value);
      const events = await follow(
        client.value,
        id,
        afterTiles(6, async () => {
          await scene.dispatcher.program.kill('SIGKILL');
          scene.dispatcher = await startDispatcher(scene.dataDir, port);
        }),
      );
      const detail = await client.value.job(id);
      expectEachAcceptedOnce(detail, events);
      expect(await artifacts(client.value, detail)).toEqual(undisturbed);
      expect(scene.nodes.map(({ program }) => program.exitCode)).toEqual([null, null]);
    },
  );
});
