/**
 * Files of the world in, typed geography out: the atlas (TopoJSON, as the `world-atlas` package ships it) and a person's
 * own GeoJSON or TopoJSON. Everything past this file trusts its types.
 */
import { MillraceError } from '@millrace/runner';
import { geoArea } from 'd3-geo';
import type { Feature, Geometry, GeometryCollection, MultiLineString, Polygon, Position } from 'geojson';
import { feature, mesh, neighbors } from 'topojson-client';
import type { GeometryCollection as TopoCollection, GeometryObject, Topology } from 'topojson-specification';

/** A country with the number of its colour. */
export interface Country {
  /** ISO 3166-1 numeric, or '' where there is none. */
  readonly id: string;
  readonly name: string;
  /** 0 to {@link PALETTE_SIZE} - 1; neighbours differ. */
  readonly color: number;
  readonly geometry: Geometry;
}

export interface Atlas {
  readonly countries: readonly Country[];
  /** Between countries. */
  readonly borders: MultiLineString;
  /** Between land and water. */
  readonly coast: MultiLineString;
  readonly land: Geometry;
}

/** Colours countries are told apart with. Four would do for a plane without exclaves; more look less of a puzzle. */
export const PALETTE_SIZE = 6;

type CountryProperties = { readonly name?: string };

/**
 * Reads the atlas.
 *
 * @throws MillraceError `invalid_argument` for bytes that are not a topology with the objects `countries` and `land`.
 */
export function readAtlas(bytes: Uint8Array): Atlas {
  const value = parseObject(bytes, 'the atlas');
  const topology = checkTopology(value, 'the atlas') as Topology<{
    countries?: TopoCollection<CountryProperties>;
    land?: GeometryObject;
  }>;
  const { countries, land } = topology.objects;
  if (countries?.type !== 'GeometryCollection' || !land) {
    throw invalid(
      'the atlas must have the objects "countries" (a GeometryCollection) and "land", as in world-atlas/countries-*.json, ' +
        `got ${Object.keys(topology.objects).join(', ') || 'none'}`,
    );
  }
  return guarded('the atlas', () => {
    const colors = colorMap(neighbors(countries.geometries));
    return {
      countries: feature(topology, countries).features.map(({ id, properties, geometry }, index) => ({
        id: String(id ?? ''),
        name: properties?.name ?? '',
        color: colors[index] ?? 0,
        geometry: turned(geometry),
      })),
      borders: mesh(topology, countries, (a, b) => a !== b),
      coast: mesh(topology, land),
      land: turned(geometryOf(feature(topology, land))),
    };
  });
}

/**
 * A colour for each region so that no two neighbours share one while that is possible: the region with the most colours
 * around it is next (DSATUR), and of the free colours it takes the one used least so far.
 */
export function colorMap(neighborLists: readonly (readonly number[])[]): number[] {
  const colors: (number | null)[] = neighborLists.map(() => null);
  const used = Array.from({ length: PALETTE_SIZE }, () => 0);
  const around = (region: number): Set<number> =>
    new Set(
      neighborLists[region]!.map((other) => colors[other]).filter((color) => typeof color === 'number'),
    );
  for (let left = neighborLists.length; left > 0; left -= 1) {
    let next = -1;
    let [nextSaturation, nextDegree] = [-1, -1];
    for (const [region, list] of neighborLists.entries()) {
      if (colors[region] !== null) continue;
      const saturation = around(region).size;
      if (saturation > nextSaturation || (saturation === nextSaturation && list.length > nextDegree)) {
        [next, nextSaturation, nextDegree] = [region, saturation, list.length];
      }
    }
    const taken = around(next);
    const free = used.map((count, color) => ({ color, count })).filter(({ color }) => !taken.has(color));
    // None is free only where more than five regions touch each other, which no map of the world has.
    const best = free.toSorted((a, b) => a.count - b.count || a.color - b.color)[0] ?? { color: 0 };
    colors[next] = best.color;
    used[best.color]! += 1;
  }
  return colors.map((color) => color ?? 0);
}

/**
 * Reads a person's own file: any GeoJSON object, or a topology, of which all objects are taken. Rings are turned the
 * way spherical geometry needs them, since files follow either of two opposite customs.
 *
 * @throws MillraceError `invalid_argument` naming the member, the rule and the value.
 */
export function readFeatures(bytes: Uint8Array, what: string): Feature[] {
  const value = parseObject(bytes, what);
  const features: Feature[] = [];
  if (value['type'] === 'Topology') {
    const topology = checkTopology(value, what);
    for (const [name, object] of Object.entries(topology.objects)) {
      const found = guarded(`${what}, object ${JSON.stringify(name)}`, () => feature(topology, object));
      collect(found, `${what}, object ${JSON.stringify(name)}`, features);
    }
  } else {
    collect(value, what, features);
  }
  if (features.length === 0) throw invalid(`${what} has no geometry to draw`);
  return features;
}

const GEOMETRY_DEPTH: Readonly<Record<string, number>> = {
  Point: 0,
  MultiPoint: 1,
  LineString: 1,
  MultiLineString: 2,
  Polygon: 2,
  MultiPolygon: 3,
};

/** Deeper collections than this are taken for an attack, not a map. */
const MAX_COLLECTION_DEPTH = 16;

/** Adds the features below any GeoJSON object, checked. Features without a geometry are left out. */
function collect(value: unknown, path: string, into: Feature[], depth = 0): void {
  if (depth > MAX_COLLECTION_DEPTH) throw invalid(`${path} is nested more than ${MAX_COLLECTION_DEPTH} deep`);
  const object = asObject(value, path);
  const type = object['type'];
  if (type === 'FeatureCollection') {
    const items = asArray(object['features'], `${path}.features`);
    for (const [index, item] of items.entries()) collect(item, `${path}.features[${index}]`, into, depth + 1);
  } else if (type === 'Feature') {
    if (object['geometry'] !== null) collect(object['geometry'], `${path}.geometry`, into, depth + 1);
  } else if (type === 'GeometryCollection') {
    const items = asArray(object['geometries'], `${path}.geometries`);
    for (const [index, item] of items.entries())
      collect(item, `${path}.geometries[${index}]`, into, depth + 1);
  } else if (typeof type === 'string' && Object.hasOwn(GEOMETRY_DEPTH, type)) {
    into.push({
      type: 'Feature',
      properties: null,
      geometry: checkGeometry(type, object['coordinates'], path),
    });
  } else {
    throw invalid(
      `${path} must be GeoJSON or TopoJSON: its "type" must be FeatureCollection, Feature, GeometryCollection, ` +
        `${Object.keys(GEOMETRY_DEPTH).join(', ')} or Topology, got ${JSON.stringify(type) ?? 'nothing'}`,
    );
  }
}

function checkGeometry(type: string, coordinates: unknown, path: string): Geometry {
  const at = `${path}.coordinates`;
  switch (type) {
    case 'Point':
      return { type, coordinates: checkPosition(coordinates, at) };
    case 'MultiPoint':
      return { type, coordinates: checkLine(coordinates, at, 1) };
    case 'LineString':
      return { type, coordinates: checkLine(coordinates, at, 2) };
    case 'MultiLineString':
      return { type, coordinates: checkList(coordinates, at, (line, where) => checkLine(line, where, 2)) };
    case 'Polygon':
      return { type, coordinates: checkPolygon(coordinates, at) };
    default:
      return { type: 'MultiPolygon', coordinates: checkList(coordinates, at, checkPolygon) };
  }
}

function checkList<T>(value: unknown, path: string, check: (item: unknown, path: string) => T): T[] {
  return asArray(value, path).map((item, index) => check(item, `${path}[${index}]`));
}

function checkPosition(value: unknown, path: string): Position {
  const [longitude, latitude] = asArray(value, path);
  if (typeof longitude !== 'number' || typeof latitude !== 'number') {
    throw invalid(`${path} must be [longitude, latitude], got ${JSON.stringify(value)?.slice(0, 60)}`);
  }
  if (Math.abs(longitude) > 360 || Math.abs(latitude) > 90) {
    throw invalid(
      `${path} must be degrees, longitude first (WGS 84, as GeoJSON demands), got [${longitude}, ${latitude}]; ` +
        'convert a file in another coordinate system first, e.g. with ogr2ogr -t_srs EPSG:4326',
    );
  }
  return [longitude, latitude];
}

function checkLine(value: unknown, path: string, atLeast: number): Position[] {
  const line = checkList(value, path, checkPosition);
  if (line.length < atLeast) {
    throw invalid(`${path} must have at least ${atLeast} position(s), got ${line.length}`);
  }
  return line;
}

function checkPolygon(value: unknown, path: string): Position[][] {
  return turnRings(checkList(value, path, (ring, where) => checkLine(ring, where, 3)));
}

/** Steradians: less than a square metre. A ring of no area has no inside that could be told from its outside. */
const NO_AREA = 1e-14;

/**
 * The rings of a polygon, closed, and turned the way spherical geometry needs them: clockwise around what they enclose,
 * holes the other way. Turned wrongly, an island is the world without that island. The largest ring is the outer one:
 * not always the first, as in the Antarctica of world-atlas 50m.
 */
function turnRings(rings: readonly Position[][]): Position[][] {
  return rings
    .map((ring) => {
      const [first, last] = [ring[0]!, ring.at(-1)!];
      const closed = first[0] === last[0] && first[1] === last[1] ? ring : [...ring, first];
      const alone: Polygon = { type: 'Polygon', coordinates: [closed] };
      const around = geoArea(alone);
      return { closed, enclosesMost: around > 2 * Math.PI, area: Math.min(around, 4 * Math.PI - around) };
    })
    .filter(({ area }) => area > NO_AREA)
    .toSorted((a, b) => b.area - a.area)
    .map(({ closed, enclosesMost }, index) => (enclosesMost === index > 0 ? closed : closed.toReversed()));
}

/** Areas of the atlas, turned right: in rounding to its grid, some small islands there came to be turned over. */
function turned(geometry: Geometry): Geometry {
  if (geometry.type === 'Polygon') return { ...geometry, coordinates: turnRings(geometry.coordinates) };
  if (geometry.type === 'MultiPolygon') {
    return { ...geometry, coordinates: geometry.coordinates.map(turnRings) };
  }
  if (geometry.type === 'GeometryCollection') {
    return { ...geometry, geometries: geometry.geometries.map(turned) };
  }
  return geometry;
}

function checkTopology(value: Readonly<Record<string, unknown>>, what: string): Topology {
  const objects = value['objects'];
  if (
    value['type'] !== 'Topology' ||
    !Array.isArray(value['arcs']) ||
    typeof objects !== 'object' ||
    objects === null ||
    Array.isArray(objects)
  ) {
    throw invalid(
      `${what} must be TopoJSON: type "Topology" with an array "arcs" and an object "objects", got type ` +
        (JSON.stringify(value['type']) ?? 'nothing'),
    );
  }
  return value as unknown as Topology;
}

function geometryOf(value: ReturnType<typeof feature>): Geometry {
  if (value.type === 'Feature') return value.geometry;
  const collection: GeometryCollection = {
    type: 'GeometryCollection',
    geometries: value.features.map((one) => one.geometry),
  };
  return collection;
}

/** A topology that is not what it says (an arc that does not exist, say) shows only while it is walked. */
function guarded<T>(what: string, read: () => T): T {
  try {
    return read();
  } catch (cause) {
    if (MillraceError.is(cause)) throw cause;
    throw new MillraceError('invalid_argument', `${what} is not a valid topology`, { cause });
  }
}

function parseObject(bytes: Uint8Array, what: string): Readonly<Record<string, unknown>> {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch (cause) {
    const gzip = bytes[0] === 0x1f && bytes[1] === 0x8b;
    throw new MillraceError(
      'invalid_argument',
      `${what} must be GeoJSON or TopoJSON, but it is not JSON${gzip ? ' (it is gzip: unpack it first)' : ''}`,
      { cause },
    );
  }
  return asObject(value, what);
}

function asObject(value: unknown, path: string): Readonly<Record<string, unknown>> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
    return value as Readonly<Record<string, unknown>>;
  }
  throw invalid(`${path} must be a GeoJSON object, got ${kind(value)}`);
}

function asArray(value: unknown, path: string): readonly unknown[] {
  if (Array.isArray(value)) return value as readonly unknown[];
  throw invalid(`${path} must be an array, got ${kind(value)}`);
}

function kind(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (value === null) return 'null';
  return Array.isArray(value) ? 'an array' : `a ${typeof value}`;
}

function invalid(message: string): MillraceError {
  return new MillraceError('invalid_argument', message);
}
