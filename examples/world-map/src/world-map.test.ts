/** The three stages chained as a dispatcher chains them, at a small size. */
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { createCanvas, loadImage } from '@napi-rs/canvas';
import { createTestContext, runnerSuite } from '@millrace/runner/testing';
import type { TestContext, TestContextOptions, TestInput } from '@millrace/runner/testing';
import { geoNaturalEarth1 } from 'd3-geo';
import { beforeAll, describe, expect, test } from 'vitest';
import { placesOf, planMap, planMeta, tileName } from './plan.ts';
import type { MapPlan } from './plan.ts';
import prepare from './runners/prepare.ts';
import stitch from './runners/stitch.ts';
import tile from './runners/tile.ts';

const WIDTH = 640;
const HEIGHT = 320;

const atlas = await readFile(fileURLToPath(import.meta.resolve('world-atlas/countries-110m.json')));
const text = (bytes: Uint8Array | undefined): string => new TextDecoder().decode(bytes);

async function perform(
  runner: typeof prepare,
  options: TestContextOptions,
): Promise<Pick<TestContext, 'outputs' | 'artifacts' | 'progressValues'>> {
  await using ctx = createTestContext(options);
  await runner.run(ctx);
  return ctx;
}

/** The outputs of one stage as the inputs of the next. */
function asInputs({
  outputs,
  artifacts,
}: Pick<TestContext, 'outputs' | 'artifacts'>): Record<string, TestInput> {
  return Object.fromEntries(
    artifacts.map(({ id, name, data_type, logical_path }) => [
      `${id}/${logical_path}`,
      { content: outputs.get(logical_path)!, name, data_type },
    ]),
  );
}

async function drawTiles(plan: MapPlan, overlay?: string): Promise<Record<string, TestInput>> {
  const prepared = await perform(prepare, {
    inputs: { atlas, ...(overlay !== undefined && { overlay }) },
    task: { meta: planMeta(plan) },
  });
  let tiles: Record<string, TestInput> = {};
  for (const { column, row } of placesOf(plan.grid)) {
    const scene = prepared.outputs.get(`tiles/${tileName(column, row)}.json`)!;
    const drawn = await perform(tile, { inputs: { scene }, task: { meta: { column, row } } });
    // Ids of a real domain differ from task to task; here the path in them does.
    tiles = { ...tiles, ...asInputs(drawn) };
  }
  return tiles;
}

interface Drawn {
  readonly png: Uint8Array;
  readonly summary: { readonly [key: string]: unknown };
  readonly pixels: Uint8ClampedArray;
  readonly at: (x: number, y: number) => readonly [number, number, number];
}

async function drawMap(plan: MapPlan, overlay?: string): Promise<Drawn> {
  const inputs = await drawTiles(plan, overlay);
  const { outputs } = await perform(stitch, { inputs, task: { meta: planMeta(plan) } });
  const png = outputs.get('map.png')!;
  const image = await loadImage(png);
  expect([image.width, image.height]).toEqual([plan.size.width, plan.size.height]);
  const context = createCanvas(image.width, image.height).getContext('2d');
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  return {
    png,
    summary: JSON.parse(text(outputs.get('map.json'))) as Drawn['summary'],
    pixels,
    at: (x, y) => {
      const from = 4 * (Math.round(y) * image.width + Math.round(x));
      return [pixels[from]!, pixels[from + 1]!, pixels[from + 2]!];
    },
  };
}

describe('the map of the world', () => {
  const plan = planMap(WIDTH, { columns: 4, rows: 2 }, false);
  const projection = geoNaturalEarth1().fitExtent(
    [
      [WIDTH * 0.018, HEIGHT * 0.018],
      [WIDTH * (1 - 0.018), HEIGHT * (1 - 0.018)],
    ],
    { type: 'Sphere' },
  );
  let map: Drawn;
  const place = (longitude: number, latitude: number): readonly [number, number, number] =>
    map.at(...projection([longitude, latitude])!);
  const isWater = ([red, green, blue]: readonly [number, number, number]): boolean =>
    green > red + 8 && blue > green;

  beforeAll(async () => {
    map = await drawMap(plan);
  });

  test('has water where there is sea, land where there is land, and paper outside the globe', () => {
    for (const [longitude, latitude] of [
      [-30, 0],
      [-140, 20],
      [80, -30],
      [170, -50],
      [5, 38],
    ] as const) {
      expect(isWater(place(longitude, latitude)), `${longitude}, ${latitude}`).toBe(true);
    }
    for (const [longitude, latitude] of [
      [20, 0],
      [-100, 40],
      [135, -25],
      [100, 60],
      [0, -80],
      [-55, -10],
    ] as const) {
      expect(isWater(place(longitude, latitude)), `${longitude}, ${latitude}`).toBe(false);
    }
    expect(map.at(2, 2)).toEqual([0xf6, 0xf1, 0xe5]);
    expect(map.at(WIDTH - 3, HEIGHT - 3)).toEqual([0xf6, 0xf1, 0xe5]);
  });

  test('tells neighbours apart by colour', () => {
    const middles: Record<string, readonly [number, number]> = {
      Brazil: [-52, -10],
      Argentina: [-66, -35],
      Algeria: [2.5, 28],
      Libya: [18, 27],
      Canada: [-105, 58],
      'the United States': [-100, 40],
      China: [103, 35],
      Mongolia: [104, 47],
    };
    const color = (name: string): string => place(...middles[name]!).join();
    expect(color('Brazil')).not.toBe(color('Argentina'));
    expect(color('Algeria')).not.toBe(color('Libya'));
    expect(color('Canada')).not.toBe(color('the United States'));
    expect(color('China')).not.toBe(color('Mongolia'));
  });

  test('is the same to the byte when it is drawn again', async () => {
    const again = await drawMap(plan);
    expect(Buffer.from(again.png).equals(map.png)).toBe(true);
    expect(again.summary).toEqual(map.summary);
  });

  test('shows no seams: cut otherwise, it is the same picture', async () => {
    const whole = await drawMap(planMap(WIDTH, { columns: 1, rows: 1 }, false));
    const odd = await drawMap(planMap(WIDTH, { columns: 7, rows: 3 }, false));
    for (const other of [whole, odd]) {
      let worst = 0;
      for (const [index, value] of map.pixels.entries()) {
        worst = Math.max(worst, Math.abs(value - other.pixels[index]!));
      }
      // A few steps of rounding are allowed. Without the bleed it was 25 at the seams, which still could not be seen.
      expect(worst).toBeLessThanOrEqual(6);
    }
  });

  test('comes with a summary of itself', () => {
    expect(map.summary).toEqual({
      width: WIDTH,
      height: HEIGHT,
      tiles: 8,
      bytes: map.png.length,
      sha256: expect.stringMatching(/^[0-9a-f]{64}$/) as unknown,
    });
  });
});

describe('a file of features', () => {
  const isRed = ([red, green, blue]: readonly [number, number, number]): boolean =>
    red > green + 20 && red > blue + 10;
  // Anticlockwise, as RFC 7946 wants it, which spherical geometry reads as everything but the square.
  const square = {
    type: 'Feature',
    properties: { name: 'Square' },
    geometry: {
      type: 'Polygon',
      coordinates: [
        [
          [-30, -10],
          [-10, -10],
          [-10, 10],
          [-30, 10],
          [-30, -10],
        ],
      ],
    },
  };

  test('is drawn over the world, whichever way its rings run', async () => {
    const plan = planMap(WIDTH, { columns: 2, rows: 1 }, false);
    const turned = structuredClone(square);
    turned.geometry.coordinates[0]!.reverse();
    const maps = await Promise.all([square, turned].map((feature) => drawMap(plan, JSON.stringify(feature))));
    for (const map of maps) {
      expect(isRed(map.at(WIDTH / 2 - 35, HEIGHT / 2))).toBe(true);
      expect(isRed(map.at(WIDTH / 2 - 120, HEIGHT / 2))).toBe(false);
    }
    expect(Buffer.from(maps[0]!.png).equals(maps[1]!.png)).toBe(true);
  });

  test('fills the picture with --fit', async () => {
    const plan = planMap(WIDTH, { columns: 2, rows: 1 }, true);
    const map = await drawMap(plan, JSON.stringify({ type: 'FeatureCollection', features: [square] }));
    expect(isRed(map.at(WIDTH / 2, HEIGHT / 2))).toBe(true);
    expect(isRed(map.at(WIDTH / 2, HEIGHT * 0.12))).toBe(true);
    expect(isRed(map.at(WIDTH / 2, HEIGHT * 0.04))).toBe(false);
    expect(isRed(map.at(WIDTH * 0.1, HEIGHT / 2))).toBe(false);
  });

  test('may hold areas that overlap, which does not cancel them out', async () => {
    const plan = planMap(WIDTH, { columns: 1, rows: 1 }, false);
    const once = await drawMap(plan, JSON.stringify(square));
    const twice = await drawMap(
      plan,
      JSON.stringify({ type: 'FeatureCollection', features: [square, square] }),
    );
    const [, green] = once.at(WIDTH / 2 - 35, HEIGHT / 2);
    expect(twice.at(WIDTH / 2 - 35, HEIGHT / 2)[1]).toBeLessThan(green - 20);
  });

  test('may be points and lines, and a single point can be fitted', async () => {
    const plan = planMap(WIDTH, { columns: 1, rows: 1 }, true);
    const point = { type: 'Point', coordinates: [2.35, 48.86] };
    const map = await drawMap(plan, JSON.stringify(point));
    expect(isRed(map.at(WIDTH / 2, HEIGHT / 2))).toBe(true);
    const line = {
      type: 'LineString',
      coordinates: [
        [-60, 0],
        [60, 0],
      ],
    };
    const world = await drawMap({ ...plan, fit: false }, JSON.stringify(line));
    expect(isRed(world.at(WIDTH / 2 - 60, HEIGHT / 2))).toBe(true);
  });
});

describe('prepare', () => {
  const plan = planMap(128, { columns: 2, rows: 1 }, false);
  const meta = planMeta(plan);
  const outputs = ['manifest.json', 'tiles/tile-00-00.json', 'tiles/tile-01-00.json'];
  const bad = (overlay: string): TestContextOptions => ({ inputs: { atlas, overlay }, task: { meta } });
  runnerSuite(prepare, {
    test,
    quietMs: 5,
    cases: [
      { name: 'the atlas alone', context: { inputs: { atlas }, task: { meta } }, outputs },
      {
        name: 'a TopoJSON of countries as features',
        context: { inputs: { atlas, overlay: atlas }, task: { meta } },
        outputs,
        check: (ctx) => {
          expect(JSON.parse(text(ctx.outputs.get('manifest.json')))).toMatchObject({
            projection: 'Natural Earth',
            countries: 177,
            features: 178,
          });
        },
      },
      { name: 'no input', context: { task: { meta } }, fails: /takes the atlas and at most one file/ },
      { name: 'no parameters', context: { inputs: { atlas } }, fails: /task.meta must be an object/ },
      {
        name: 'too many tiles',
        context: { inputs: { atlas }, task: { meta: { ...meta, columns: 64, rows: 17 } } },
        fails: /64x17 tiles must be at most 1024/,
      },
      {
        name: 'an atlas that is a picture',
        context: { inputs: { atlas: Uint8Array.of(0x89, 0x50) }, task: { meta } },
        fails: /the atlas must be GeoJSON or TopoJSON, but it is not JSON/,
      },
      {
        name: 'features that are text',
        context: bad('lat,lon\n1,2\n'),
        fails: /the file of features must be GeoJSON or TopoJSON/,
      },
      {
        name: 'features that are other JSON',
        context: bad('{"name":"x"}'),
        fails: /must be GeoJSON or TopoJSON: its "type" must be/,
      },
      {
        name: 'features in metres',
        context: bad('{"type":"Point","coordinates":[500000,4649776]}'),
        fails: /must be degrees, longitude first/,
      },
    ],
  });
});

describe('tile', () => {
  let scene: Uint8Array = new Uint8Array();
  beforeAll(async () => {
    const meta = planMeta(planMap(128, { columns: 1, rows: 1 }, false));
    const { outputs } = await perform(prepare, { inputs: { atlas }, task: { meta } });
    scene = outputs.get('tiles/tile-00-00.json')!;
  });
  runnerSuite(tile, {
    test,
    quietMs: 5,
    cases: [
      {
        name: 'a scene',
        context: {
          get inputs() {
            return { scene };
          },
          task: { meta: { column: 3, row: 1 } },
        },
        outputs: ['tile-03-01.png'],
      },
      {
        name: 'no scene',
        context: { task: { meta: { column: 0, row: 0 } } },
        fails: /takes one scene, got 0/,
      },
      {
        name: 'no place',
        context: { inputs: { scene: '{}' } },
        fails: /must have the integers column and row/,
      },
      {
        name: 'some other JSON',
        context: { inputs: { scene: '{"format":"x"}' }, task: { meta: { column: 0, row: 0 } } },
        fails: /must have the format millrace-world-map\/tile\/1, got "x"/,
      },
    ],
  });
});

describe('stitch', () => {
  const plan = planMap(128, { columns: 2, rows: 1 }, false);
  const task = { meta: planMeta(plan) };
  let tiles: Record<string, TestInput> = {};
  beforeAll(async () => {
    tiles = await drawTiles(plan);
  });
  /** Contexts are read when a test runs, which is after the tiles are drawn. */
  const context = (pick: (all: TestInput[]) => Record<string, TestInput>): TestContextOptions => ({
    get inputs() {
      return pick(Object.values(tiles));
    },
    task,
  });
  runnerSuite(stitch, {
    test,
    quietMs: 5,
    cases: [
      { name: 'all tiles', context: context(() => tiles), outputs: ['map.json', 'map.png'] },
      {
        name: 'all tiles in another order',
        context: context((all) => Object.fromEntries(all.toReversed().entries())),
        outputs: ['map.json', 'map.png'],
      },
      {
        name: 'a tile is missing',
        context: context((all) => Object.fromEntries(all.slice(1).entries())),
        fails: /a map of 2x1 needs 2 tiles, got 1/,
      },
      {
        name: 'a tile is there twice',
        context: context((all) => Object.fromEntries([...all, ...all.slice(1)].entries())),
        fails: /tile-01-00 is among the inputs twice/,
      },
      {
        name: 'a tile of another grid',
        context: context(([first]) => ({ a: { ...first!, name: 'tile-09-00_png' } })),
        fails: /input 0 must be named after a tile of 2x1, got "tile-09-00_png"/,
      },
      {
        name: 'a tile of another size',
        context: context((all) => ({ a: all[0]!, b: { ...all[1]!, content: onePixel } })),
        fails: /tile-01-00 must be 64 x 64 pixels, got 1 x 1/,
      },
    ],
  });
});

const onePixel = createCanvas(1, 1).toBuffer('image/png');
