import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Readable } from 'node:stream';
import { pathToFileURL } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  checkInputs,
  collectInputs,
  parseJob,
  parseNamedInputs,
  readJobFile,
  replaceInputs,
  type JobFile,
} from './job-file.ts';

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-job-file-'));
  await writeFile(path.join(dir, 'photo.jpg'), 'bytes');
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const jobWith = (...inputs_cids: string[]): JobFile => ({
  job: { tasks: [{ capability: '/x/v1', inputs_cids }] },
  baseDir: dir,
});

describe('a job file', () => {
  test('is the job spec in YAML', () => {
    const job = parseJob(
      'label: thumbs\ntasks:\n  - stage: a\n    capability: /x/v1\n    meta: { size: 256 }\n  - { stage: b, capability: /y/v1 }\nedges: [{ from: a, to: b }]\n',
      'job.yaml',
    );
    expect(job).toEqual({
      label: 'thumbs',
      tasks: [
        { stage: 'a', capability: '/x/v1', meta: { size: 256 } },
        { stage: 'b', capability: '/y/v1' },
      ],
      edges: [{ from: 'a', to: 'b' }],
    });
  });

  test('may be JSON, indented by tabs', () => {
    expect(parseJob('{\n\t"tasks": [\n\t\t{ "capability": "/x/v1" }\n\t]\n}', 'job.json').tasks).toHaveLength(
      1,
    );
  });

  test.each([
    ['tasks:\n  - capability: [\n', /^job\.yaml:3:1: /],
    ['tasks:\n  - capability: /x\n    capability: /y\n', /^job\.yaml:3:5: Map keys must be unique/],
    ['label: x\n', /^job\.yaml:1:1: tasks: is missing/],
    ['label: x\ntasks: []\n', /^job\.yaml:2:8: tasks: .*, got \[\]/],
    ['tasks:\n  - label: a\n', /^job\.yaml:2:5: tasks\[0\]\.capability: is missing/],
    [
      'tasks:\n  - capability: /x\n    priority: high\n',
      /^job\.yaml:3:15: tasks\[0\]\.priority: expected .*, got "high"/,
    ],
    [
      'tasks:\n  - capability: /x\n    resources: { gpu: 0.5 }\n',
      /^job\.yaml:3:23: tasks\[0\]\.resources\.gpu: must be a whole number from 1 to 2\^53, got 0\.5$/,
    ],
    [
      'concurrency: { key: k, limit: 0 }\ntasks:\n  - capability: /x\n',
      /^job\.yaml:1:31: concurrency\.limit: .*>=1, got 0$/,
    ],
    [
      'tasks:\n  - capability: /x\n    capabilty: /x\n',
      /^job\.yaml:3:16: tasks\[0\]: unknown member "capabilty"; known are label, stage, capability, .*deadline_at, not_before, concurrency, resources$/,
    ],
    [
      'tasks:\n  - capability: /x\nedges: [{ from: a, to: b, via: c, at: d }]\n',
      /^job\.yaml:3:\d+: edges\[0\]: unknown members "via", "at"; known are from, to$/,
    ],
    [
      'tasks:\n  - capability: a b\n',
      /^job\.yaml:2:17: tasks\[0\]\.capability: capability "a b" must not contain white space/,
    ],
    [
      'tasks:\n  - capability: /x\n    capability_filters: { gpu: true }\n',
      /capability_filters\.gpu: expected a string, or operators such as .*, got true/,
    ],
    ['', /^job\.yaml:1:1: .*got null/],
  ])('that is wrong (%j) is refused with line, path, rule and value', (text, message) => {
    expect(() => parseJob(text, 'job.yaml')).toThrow(message);
  });

  test('tells several problems at once, and how many more there are', () => {
    const tasks = Array.from({ length: 7 }, () => '  - label: x\n').join('');
    expect(() => parseJob(`tasks:\n${tasks}`, 'job.yaml')).toThrow(/tasks\[4\].*; and 2 more$/);
  });

  test('that expands without bound is refused', () => {
    const bomb = `a: &a [x,x,x,x,x,x,x,x,x]\n${['b', 'c', 'd', 'e', 'f']
      .map((name, index) => `${name}: &${name} [${Array(9).fill(`*${'abcdef'[index]}`).join(',')}]\n`)
      .join('')}`;
    expect(() => parseJob(bomb, 'job.yaml')).toThrow(/job\.yaml: .*alias/i);
  });

  test('comes from stdin as well, with references relative to the current folder', async () => {
    const file = await readJobFile('-', dir, Readable.from(['tasks: [{ capability: /x/v1 }]']));
    expect(file.baseDir).toBe(dir);
    await expect(readJobFile('-', dir, Readable.from(['[']))).rejects.toThrow(/^stdin:1:2: /);
  });

  test('that is not there is named', async () => {
    await expect(readJobFile('none.yaml', dir, process.stdin)).rejects.toThrow(
      'cannot read the job file none.yaml',
    );
  });
});

describe('local inputs', () => {
  test('are files relative to the job file, file URLs, and named ones', async () => {
    const photo = path.join(dir, 'photo.jpg');
    const url = pathToFileURL(photo).href;
    const sources = await collectInputs(
      jobWith(
        'file:./photo.jpg',
        url,
        'input:p',
        'input:s',
        'stage:a',
        '0b5f5f0e-0000-4000-8000-000000000000',
      ),
      parseNamedInputs([`p=${photo}`, 's=-'], '/'),
    );
    expect([...sources]).toEqual([
      ['file:./photo.jpg', { kind: 'file', path: photo }],
      [url, { kind: 'file', path: photo }],
      ['input:p', { kind: 'file', path: photo }],
      ['input:s', { kind: 'stdin' }],
    ]);
  });

  test('are replaced by their ids, everything else stays', () => {
    const { job } = jobWith('file:a', 'stage:x', 'file:a');
    expect(replaceInputs(job, new Map([['file:a', 'id-1']])).tasks[0]?.inputs_cids).toEqual([
      'id-1',
      'stage:x',
      'id-1',
    ]);
  });

  test.each([
    [['file:none.jpg'], [], /cannot read the input .*none\.jpg/],
    [['file:.'], [], /is a folder/],
    [['input:p'], [], /the job uses "input:p"; pass --input p=FILE/],
    [[], ['p=photo.jpg'], /--input p=… is not used/],
    [['input:a', 'input:b'], ['a=-', 'b=-'], /stdin \(-\) can be only one input/],
    [['file://host/x'], [], /is not a file URL/],
  ])('%j with --input %j are refused', async (references, options, message) => {
    const named = parseNamedInputs(options, dir);
    await expect(collectInputs(jobWith(...references), named)).rejects.toThrow(message);
  });

  test.each(['photo.jpg', '=photo.jpg', 'p='])('--input %s beside a job file is refused', (option) => {
    expect(() => parseNamedInputs([option], dir)).toThrow(/--input must be name=FILE/);
  });

  test('the same name twice is refused', () => {
    expect(() => parseNamedInputs(['p=a', 'p=b'], dir)).toThrow(/given twice/);
  });

  test('stdin cannot be the job and an input', async () => {
    const named = parseNamedInputs(['s=-'], dir);
    await expect(checkInputs(jobWith('input:s'), named, true)).rejects.toThrow(
      /cannot be the job file and an input/,
    );
    await expect(checkInputs(jobWith('input:s'), named, false)).resolves.toBeUndefined();
  });
});
