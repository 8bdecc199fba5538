/** The demo as a person runs it: as a process, which starts a dispatcher and nodes as further ones. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadImage } from '@napi-rs/canvas';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';

const DEMO = fileURLToPath(new URL('./demo.js', import.meta.url));
const TIMEOUT_MS = 180_000;

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-demo-test-'));
});
afterEach(() => rm(folder, { recursive: true }));

interface Ended {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs the demo. Its own temporary files go into the test's folder, so what it leaves behind can be seen. */
async function demo(
  args: readonly string[],
  onLine?: (line: string, kill: () => void) => void,
): Promise<Ended> {
  const child = spawn(process.execPath, [DEMO, ...args], {
    cwd: folder,
    env: { ...process.env, INIT_CWD: folder, TMPDIR: folder },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let [stdout, stderr] = ['', ''];
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
    for (const line of text.split('\n')) onLine?.(line, () => child.kill('SIGINT'));
  });
  const [code] = (await once(child, 'close')) as [number | null];
  return { code, stdout, stderr };
}

describe('the demo', () => {
  test(
    'draws a file of features on two nodes, shows the timeline, and leaves the picture and nothing else',
    async () => {
      const place = { type: 'Point', coordinates: [2.35, 48.86] };
      await writeFile(join(folder, 'paris.geojson'), JSON.stringify(place));
      const { code, stdout, stderr } = await demo(
        'paris.geojson --fit --size 256 --tiles 2x2 --out map'.split(' '),
      );
      expect(stderr).toBe('');
      expect(code).toBe(0);
      expect(stdout).toContain(`the map: ${join(folder, 'map', 'map.png')} (256 x 128)`);
      const timeline = stdout.slice(stdout.indexOf('timeline'));
      for (const label of ['prepare', 'tile-00-00', 'tile-01-00', 'tile-00-01', 'tile-01-01', 'stitch']) {
        expect(timeline).toMatch(new RegExp(`^${label} +node-[12] .*█`, 'm'));
      }
      const image = await loadImage(await readFile(join(folder, 'map', 'map.png')));
      expect([image.width, image.height]).toEqual([256, 128]);
      expect(JSON.parse(await readFile(join(folder, 'map', 'map.json'), 'utf8'))).toMatchObject({ tiles: 4 });
      expect((await readdir(folder)).toSorted()).toEqual(['map', 'paris.geojson']);
    },
    TIMEOUT_MS,
  );

  test(
    'interrupted, cancels the job, stops what it started, and exits with 3',
    async () => {
      const { code, stdout } = await demo(['--size', '1000', '--tiles', '8x8'], (line, kill) => {
        if (line.startsWith('prepare completed')) kill();
      });
      expect(stdout).toContain('canceling the job');
      expect(code).toBe(3);
      // Every process it started kept its files here, and none is there to write new ones.
      expect(await readdir(folder)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test('refuses a file that is no geography, and options out of bounds, before it starts anything', async () => {
    await writeFile(join(folder, 'notes.json'), '{"title":"x"}');
    const wrong: readonly (readonly [args: readonly string[], message: RegExp])[] = [
      [['notes.json'], /^demo: notes.json must be GeoJSON or TopoJSON: /],
      [['missing.geojson'], /^demo: cannot read .*missing.geojson: ENOENT/],
      [['--size', '63'], /^demo: --size must be an integer from 64 to 65536, got "63"/],
      [['--tiles', '8'], /^demo: --tiles must be COLUMNSxROWS, such as 8x4, got "8"/],
      [['--nodes', '9'], /^demo: --nodes must be an integer from 1 to 8, got "9"/],
      [['--fit'], /^demo: --fit needs a file to fit to/],
      [['--colour'], /^demo: Unknown option '--colour'/],
      [['a', 'b'], /^demo: one file at most, got 2/],
    ];
    const ended = await Promise.all(wrong.map(([args]) => demo(args)));
    for (const [index, [args, message]] of wrong.entries()) {
      expect(ended[index]!.stderr, args.join(' ')).toMatch(message);
      expect(ended[index]!.code).toBe(2);
      expect(ended[index]!.stdout).toBe('');
    }
  });
});
