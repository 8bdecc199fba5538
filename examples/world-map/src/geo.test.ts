import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { geoArea } from 'd3-geo';
import { neighbors } from 'topojson-client';
import type { GeometryCollection, Topology } from 'topojson-specification';
import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PALETTE_SIZE, colorMap, readAtlas, readFeatures } from './geo.ts';

const load = (name: string): Promise<Buffer> =>
  readFile(fileURLToPath(import.meta.resolve(`world-atlas/${name}.json`)));
const bytes = (value: unknown): Uint8Array => new TextEncoder().encode(JSON.stringify(value));
const read = (value: unknown): ReturnType<typeof readFeatures> => readFeatures(bytes(value), 'the file');

describe('readAtlas', () => {
  test.each(['countries-110m', 'countries-50m', 'countries-10m'])(
    '%s: every country covers less than half the world, and neighbours differ in colour',
    async (name) => {
      const file = await load(name);
      const { countries, land } = readAtlas(file);
      for (const { name: country, geometry } of countries) {
        expect(geoArea(geometry), country).toBeLessThan(2 * Math.PI);
      }
      const share = geoArea(land) / (4 * Math.PI);
      expect(share).toBeGreaterThan(0.27);
      expect(share).toBeLessThan(0.31);
      const topology = JSON.parse(file.toString()) as Topology<{ countries: GeometryCollection }>;
      for (const [index, list] of neighbors(topology.objects.countries.geometries).entries()) {
        for (const other of list.filter((other) => other !== index)) {
          expect(countries[index]!.color, `${countries[index]!.name} and ${countries[other]!.name}`).not.toBe(
            countries[other]!.color,
          );
        }
      }
      expect(new Set(countries.map(({ color }) => color)).size).toBe(PALETTE_SIZE);
    },
  );

  test('refuses what is no atlas, saying what is missing', async () => {
    expect(() => readAtlas(bytes([]))).toThrow('the atlas must be a GeoJSON object, got an array');
    expect(() => readAtlas(bytes({ type: 'FeatureCollection', features: [] }))).toThrow(
      /the atlas must be TopoJSON: .* got type "FeatureCollection"/,
    );
    expect(() => readAtlas(bytes({ type: 'Topology', arcs: [], objects: { roads: {} } }))).toThrow(
      /must have the objects "countries" .* got roads/,
    );
    const topology = JSON.parse((await load('countries-110m')).toString()) as Topology;
    expect(() => readAtlas(bytes({ ...topology, arcs: [] }))).toThrow('the atlas is not a valid topology');
  });
});

describe('colorMap', () => {
  test('never gives neighbours one colour in any map on a plane of rectangles', () => {
    // Cells of a grid, merged at random into regions: what borders what is then planar, as on a map.
    const grid = fc.array(fc.nat(11), { minLength: 36, maxLength: 36 });
    fc.assert(
      fc.property(grid, (seeds) => {
        const region = seeds.map((_, cell) => cell);
        for (const [cell, seed] of seeds.entries()) {
          if (cell % 6 > 0 && seed < 4) region[cell] = region[cell - 1]!;
        }
        const names = [...new Set(region)];
        const lists = names.map((name) => {
          const touching = new Set<number>();
          for (let cell = 0; cell < 36; cell += 1) {
            if (region[cell] !== name) continue;
            const next = [cell - 6, cell + 6, cell % 6 ? cell - 1 : -1, cell % 6 < 5 ? cell + 1 : -1];
            for (const other of next) {
              if (other >= 0 && other < 36 && region[other] !== name)
                touching.add(names.indexOf(region[other]!));
            }
          }
          return [...touching];
        });
        const colors = colorMap(lists);
        for (const [index, list] of lists.entries()) {
          for (const other of list) expect(colors[index]).not.toBe(colors[other]);
        }
      }),
    );
  });

  test('takes regions that all touch each other, up to the size of the palette and beyond', () => {
    const clique = (size: number): number[][] =>
      Array.from({ length: size }, (_, region) =>
        Array.from({ length: size }, (_other, other) => other).filter((other) => other !== region),
      );
    expect(new Set(colorMap(clique(PALETTE_SIZE))).size).toBe(PALETTE_SIZE);
    expect(colorMap(clique(PALETTE_SIZE + 1))).toHaveLength(PALETTE_SIZE + 1);
    expect(colorMap([])).toEqual([]);
  });
});

describe('readFeatures', () => {
  const ring = [
    [0, 0],
    [10, 0],
    [10, 10],
    [0, 10],
    [0, 0],
  ];

  test('takes every kind of GeoJSON, and leaves out features without a geometry', () => {
    const geometries = [
      { type: 'Point', coordinates: [1, 2, 3] },
      { type: 'MultiPoint', coordinates: [[1, 2]] },
      {
        type: 'LineString',
        coordinates: [
          [1, 2],
          [3, 4],
        ],
      },
      {
        type: 'MultiLineString',
        coordinates: [
          [
            [1, 2],
            [3, 4],
          ],
        ],
      },
      { type: 'Polygon', coordinates: [ring] },
      { type: 'MultiPolygon', coordinates: [[ring], [ring]] },
    ];
    for (const geometry of geometries) expect(read(geometry)[0]?.geometry.type).toBe(geometry.type);
    const features = geometries.map((geometry) => ({ type: 'Feature', properties: null, geometry }));
    const collection = { type: 'GeometryCollection', geometries };
    expect(read(features[0])).toHaveLength(1);
    expect(read(collection)).toHaveLength(6);
    expect(
      read({
        type: 'FeatureCollection',
        features: [
          ...features,
          { type: 'Feature', geometry: null },
          { type: 'Feature', geometry: collection },
        ],
      }),
    ).toHaveLength(12);
  });

  test('takes all objects of a topology', async () => {
    const features = readFeatures(await load('countries-110m'), 'the file');
    expect(features).toHaveLength(178);
  });

  test('turns rings and closes them', () => {
    const hole = [
      [2, 2],
      [2, 4],
      [4, 4],
      [4, 2],
      [2, 2],
    ];
    const areas = [ring, ring.toReversed(), ring.slice(0, -1)].flatMap((outer) =>
      [hole, hole.toReversed()].map((inner) => {
        const [feature] = read({ type: 'Polygon', coordinates: [outer, inner] });
        return geoArea(feature!);
      }),
    );
    for (const area of areas) expect(area).toBeCloseTo(areas[0]!, 12);
    expect(areas[0]).toBeLessThan(geoArea(read({ type: 'Polygon', coordinates: [ring] })[0]!));
  });

  test.each([
    [[], 'the file must be a GeoJSON object, got an array'],
    [null, 'the file must be a GeoJSON object, got null'],
    [
      { type: 'Topology', arcs: 1, objects: {} },
      /the file must be TopoJSON: type "Topology" with an array "arcs"/,
    ],
    [
      { type: 'Topology', arcs: [], objects: { roads: { type: 'LineString', arcs: [7] } } },
      'the file, object "roads" is not a valid topology',
    ],
    [{ type: 'Curve' }, /the file must be GeoJSON or TopoJSON: .* got "Curve"/],
    [{ type: 'toString' }, /got "toString"/],
    [{ type: 'FeatureCollection' }, 'the file.features must be an array, got nothing'],
    [
      { type: 'FeatureCollection', features: [7] },
      'the file.features[0] must be a GeoJSON object, got a number',
    ],
    [{ type: 'FeatureCollection', features: [] }, 'the file has no geometry to draw'],
    [
      { type: 'Feature', geometry: { type: 'Point' } },
      'the file.geometry.coordinates must be an array, got nothing',
    ],
    [{ type: 'Point', coordinates: ['1', '2'] }, /must be \[longitude, latitude\], got \["1","2"\]/],
    [{ type: 'Point', coordinates: [0, 90.5] }, /must be degrees, longitude first .* got \[0, 90.5\]/],
    [{ type: 'LineString', coordinates: [[0, 0]] }, /coordinates must have at least 2 position\(s\), got 1/],
    [
      {
        type: 'Polygon',
        coordinates: [
          [
            [0, 0],
            [1, 1],
          ],
        ],
      },
      /coordinates\[0\] must have at least 3 position\(s\), got 2/,
    ],
    [
      { type: 'MultiPolygon', coordinates: [[ring], [[7]]] },
      /coordinates\[1\]\[0\]\[0\] must be an array, got a number/,
    ],
  ])('refuses %j', (value, message) => {
    expect(() => read(value)).toThrow(message);
  });

  test('refuses deep nesting, gzip, and what is not UTF-8', () => {
    let nested: unknown = { type: 'Point', coordinates: [0, 0] };
    for (let depth = 0; depth < 16; depth += 1) nested = { type: 'GeometryCollection', geometries: [nested] };
    expect(read(nested)).toHaveLength(1);
    expect(() => read({ type: 'GeometryCollection', geometries: [nested] })).toThrow(
      /nested more than 16 deep/,
    );
    expect(() => readFeatures(Uint8Array.of(0x1f, 0x8b, 8), 'the file')).toThrow(
      /it is gzip: unpack it first/,
    );
    expect(() => readFeatures(Uint8Array.of(0x22, 0xff, 0x22), 'the file')).toThrow(/it is not JSON/);
  });
});
