/**
 * From geography to pictures: the projection, and what lies on each tile of the picture.
 *
 * Everything is projected once, for the whole picture, to integers of {@link UNIT} per pixel; a tile gets the shapes
 * that touch it, cut to the tile and a margin, moved to its corner. The move is by whole pixels, so a line is
 * drawn with the same coverage on both sides of a seam and the seam cannot be seen.
 */
import {
  geoAzimuthalEqualArea,
  geoBounds,
  geoCentroid,
  geoCircle,
  geoDistance,
  geoGraticule,
  geoIdentity,
  geoNaturalEarth1,
  geoStream,
} from 'd3-geo';
import type { GeoPermissibleObjects, GeoProjection, GeoStream } from 'd3-geo';
import type { Feature, FeatureCollection, Position } from 'geojson';
import type { Atlas } from './geo.ts';

/** Steps of a coordinate per pixel. */
export const UNIT = 16;

/**
 * Pixels around a tile that are painted and cut off: coverage of a line that the edge of the canvas cuts is rounded
 * a little differently, which would show along seams.
 */
export const BLEED = 8;

/** The width at which line widths are as written in the style, pixels. */
const REFERENCE_WIDTH = 8192;

export interface PictureSize {
  readonly width: number;
  readonly height: number;
}

/** How a picture is cut. */
export interface Grid {
  readonly columns: number;
  readonly rows: number;
}

/** A rectangle in pixels. */
export interface Rect {
  readonly x: number;
  readonly y: number;
  readonly width: number;
  readonly height: number;
}

export type LayerKind =
  | 'sphere'
  | 'graticule'
  | 'land'
  | 'country'
  | 'border'
  | 'coast'
  | 'shallows'
  | 'overlay-area'
  | 'overlay-line'
  | 'overlay-point';

/** Shapes drawn the same way. Each path is x0, y0, x1, y1, … in {@link UNIT}ths of a pixel from the tile's corner. */
export interface Layer {
  readonly kind: LayerKind;
  /** Countries: the number of the colour, or `ice`. */
  readonly color?: number | 'ice';
  readonly paths: readonly (readonly number[])[];
}

/** All a tile's painter needs to know. JSON. */
export interface TileScene {
  readonly format: 'millrace-world-map/tile/1';
  readonly picture: PictureSize;
  readonly tile: Rect;
  /** Multiply line widths with it. */
  readonly scale: number;
  /** In the order they are painted. */
  readonly layers: readonly Layer[];
}

export interface SceneOptions {
  readonly size: PictureSize;
  readonly overlay: readonly Feature[];
  /** Look at the overlay only, instead of the world. */
  readonly fit: boolean;
}

/** Antarctica and Greenland, which are ice and not a colour of the political map. */
const ICE: ReadonlySet<string> = new Set(['010', '304']);

/** Beyond this many radians around the middle of a fitted view nothing is drawn. */
const FIT_HORIZON = 2.4;

/** A projected layer over the whole picture, with the bounds of each shape for finding it again. */
interface PictureLayer {
  readonly kind: LayerKind;
  readonly color?: number | 'ice';
  readonly shapes: readonly Shape[];
}

interface Shape {
  /** Rings that belong together (an area and its holes), or lines, or points. */
  readonly paths: readonly (readonly number[])[];
  readonly left: number;
  readonly top: number;
  readonly right: number;
  readonly bottom: number;
}

/** The projected map; {@link sceneOf} cuts tiles from it. */
export interface Picture {
  readonly size: PictureSize;
  readonly projection: 'Natural Earth' | 'azimuthal equal-area';
  readonly layers: readonly PictureLayer[];
}

/** The pixels of one tile; tiles of one grid cover the picture without overlap, whatever the sizes. */
export function tileRect({ width, height }: PictureSize, grid: Grid, column: number, row: number): Rect {
  const x = Math.floor((column * width) / grid.columns);
  const y = Math.floor((row * height) / grid.rows);
  return {
    x,
    y,
    width: Math.floor(((column + 1) * width) / grid.columns) - x,
    height: Math.floor(((row + 1) * height) / grid.rows) - y,
  };
}

/**
 * Projects everything, one layer after the other, so that the caller can report progress and stop in between. The
 * generator's return value is the picture.
 */
export function* projectPicture(atlas: Atlas, options: SceneOptions): Generator<LayerKind, Picture> {
  const { name, projection, graticule } = viewOf(options);
  const layers: PictureLayer[] = [];
  const areas = (...objects: readonly GeoPermissibleObjects[]): Shape[] =>
    objects.flatMap((object) => project(object, projection, { unit: UNIT, closed: true }));
  const lines = (...objects: readonly GeoPermissibleObjects[]): Shape[] =>
    objects.flatMap((object) => project(object, projection, { unit: UNIT, closed: false }));

  layers.push({ kind: 'sphere', shapes: areas({ type: 'Sphere' }) });
  layers.push({ kind: 'graticule', shapes: lines(graticule) });
  yield 'graticule';
  layers.push({ kind: 'land', shapes: areas(atlas.land) });
  yield 'land';
  for (const { id, color, geometry } of atlas.countries) {
    layers.push({ kind: 'country', color: ICE.has(id) ? 'ice' : color, shapes: areas(geometry) });
  }
  yield 'country';
  layers.push({ kind: 'border', shapes: lines(atlas.borders) });
  yield 'border';
  layers.push({ kind: 'coast', shapes: lines(atlas.coast) });
  // Lines as wide as these hide detail, and stroking it took most of a tile's time: 1.2 s of 1.8 s in the Arctic.
  const coarse = { unit: UNIT, closed: false, spacing: Math.max(1, 3 * scaleOf(options.size)) };
  layers.push({ kind: 'shallows', shapes: project(atlas.coast, projection, coarse) });
  yield 'coast';
  const drawn = options.overlay.map(({ geometry }) => geometry);
  const ofKind = (suffix: string): GeoPermissibleObjects[] =>
    drawn.filter(({ type }) => type.endsWith(suffix));
  // A layer each: areas that overlap are to be seen through each other, not to cancel each other out.
  for (const area of ofKind('Polygon')) layers.push({ kind: 'overlay-area', shapes: areas(area) });
  layers.push({ kind: 'overlay-line', shapes: lines(...ofKind('LineString')) });
  layers.push({ kind: 'overlay-point', shapes: lines(...ofKind('Point')) });
  yield 'overlay-area';
  return { size: options.size, projection: name, layers: layers.filter(({ shapes }) => shapes.length > 0) };
}

/**
 * The picture with everything left out that lies outside a rectangle. Cutting tiles from a part they are all in (a row of
 * them) is faster than cutting each from the whole: continents are walked once per part.
 */
export function partOf(picture: Picture, rect: Rect): Picture {
  // Cutting an area adds edges along the cut, which must lie further out than the widest line is thick.
  const margin = BLEED + Math.ceil(48 * scaleOf(picture.size)) + 4;
  const left = (rect.x - margin) * UNIT;
  const top = (rect.y - margin) * UNIT;
  const right = (rect.x + rect.width + margin) * UNIT;
  const bottom = (rect.y + rect.height + margin) * UNIT;
  const clip = geoIdentity().clipExtent([
    [left, top],
    [right, bottom],
  ]);
  const layers = picture.layers.map((layer): PictureLayer => {
    const closed = isArea(layer.kind);
    const shapes = layer.shapes.flatMap((shape) => {
      if (shape.right < left || shape.left > right || shape.bottom < top || shape.top > bottom) return [];
      const inside = shape.left >= left && shape.right <= right && shape.top >= top && shape.bottom <= bottom;
      return inside ? [shape] : project(geometryOf(shape, closed), clip, { unit: 1, closed, spacing: 0 });
    });
    return { ...layer, shapes };
  });
  return { ...picture, layers: layers.filter(({ shapes }) => shapes.length > 0) };
}

/** What lies on one tile. */
export function sceneOf(picture: Picture, tile: Rect): TileScene {
  const moved = (path: readonly number[]): number[] =>
    path.map((value, index) => value - (index % 2 === 0 ? tile.x : tile.y) * UNIT);
  return {
    format: 'millrace-world-map/tile/1',
    picture: picture.size,
    tile,
    scale: scaleOf(picture.size),
    layers: partOf(picture, tile).layers.map(({ shapes, ...style }) => ({
      ...style,
      paths: shapes.flatMap(({ paths }) => paths.map(moved)),
    })),
  };
}

function scaleOf({ width }: PictureSize): number {
  return width / REFERENCE_WIDTH;
}

function isArea(kind: LayerKind): boolean {
  return kind === 'sphere' || kind === 'land' || kind === 'country' || kind === 'overlay-area';
}

interface View {
  readonly name: Picture['projection'];
  readonly projection: GeoProjection;
  readonly graticule: GeoPermissibleObjects;
}

/** The world; or, where that is asked for, the overlay in a projection around its own middle. */
function viewOf({ size: { width, height }, overlay, fit }: SceneOptions): View {
  const frame = (share: number): [[number, number], [number, number]] => [
    [width * share, height * share],
    [width * (1 - share), height * (1 - share)],
  ];
  const world: View = {
    name: 'Natural Earth',
    projection: geoNaturalEarth1().precision(0.3).fitExtent(frame(0.018), { type: 'Sphere' }),
    graticule: geoGraticule().step([15, 15])(),
  };
  if (!fit || overlay.length === 0) return world;

  const features: FeatureCollection = { type: 'FeatureCollection', features: [...overlay] };
  const middle = geoCentroid(features);
  const [[west, south], [east, north]] = geoBounds(features);
  const corners = [west, east].flatMap((x) => [south, north].map((y): [number, number] => [x, y]));
  const reach = Math.max(...corners.map((corner) => geoDistance(middle, corner)));
  // What is most of the world anyway (or has no middle, which makes this NaN) is shown as the world.
  if (!(reach < FIT_HORIZON / 2)) return world;

  const [longitude, latitude] = middle;
  // At least one degree across, so that a single point is not blown up to the size of the picture.
  const least: Feature = {
    type: 'Feature',
    properties: null,
    geometry: geoCircle().center(middle).radius(0.5)(),
  };
  const projection = geoAzimuthalEqualArea()
    .rotate([-longitude, -latitude])
    .clipAngle((FIT_HORIZON * 180) / Math.PI)
    .precision(0.3)
    .fitExtent(frame(0.08), { type: 'FeatureCollection', features: [...overlay, least] })
    .clipExtent(frame(-0.05));
  const extent = Math.max(north - south, (east - west + 360) % 360, 1);
  const step = [1, 2, 5, 10, 15].find((degrees) => extent / degrees <= 8) ?? 15;
  return { name: 'azimuthal equal-area', projection, graticule: geoGraticule().step([step, step])() };
}

interface ProjectOptions {
  /** What a coordinate is multiplied with. */
  readonly unit: number;
  /** Whether paths are rings. */
  readonly closed: boolean;
  /**
   * Points nearer than this to the one before are left out, pixels. Default a quarter: that cannot be seen, and a detailed
   * coast has many points closer than that.
   */
  readonly spacing?: number;
}

/** Runs geography through a projection, or planar shapes through a cut, and collects what comes out. */
function project(
  object: GeoPermissibleObjects,
  through: { stream(sink: GeoStream): GeoStream },
  { unit, closed, spacing = 0.25 }: ProjectOptions,
): Shape[] {
  const least = spacing * unit;
  const shapes: Shape[] = [];
  let paths: number[][] = [];
  /** The ring or line under way; null between them, where points stand for themselves. */
  let path: number[] | null = null;
  const finishShape = (): void => {
    const kept = paths.filter((one) => one.length >= (closed ? 6 : 2));
    if (kept.length > 0) shapes.push(shapeOf(kept));
    paths = [];
  };
  geoStream(
    object,
    through.stream({
      point(px, py) {
        const [x, y] = [Math.round(px * unit), Math.round(py * unit)];
        if (path === null) {
          paths.push([x, y]);
          finishShape();
          return;
        }
        const near =
          path.length > 0 && Math.abs(x - path.at(-2)!) < least && Math.abs(y - path.at(-1)!) < least;
        if (!near) path.push(x, y);
      },
      lineStart() {
        path = [];
      },
      lineEnd() {
        paths.push(path ?? []);
        path = null;
        if (!closed) finishShape();
      },
      polygonStart() {
        paths = [];
      },
      polygonEnd: finishShape,
    }),
  );
  return shapes;
}

function shapeOf(paths: readonly (readonly number[])[]): Shape {
  let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const path of paths) {
    for (let index = 0; index < path.length; index += 2) {
      const [x, y] = [path[index]!, path[index + 1]!];
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
    }
  }
  return { paths, left, top, right, bottom };
}

/** A shape as the planar GeoJSON it takes to cut it. */
function geometryOf({ paths }: Shape, closed: boolean): GeoPermissibleObjects {
  const positions = paths.map((path) => {
    const points: Position[] = [];
    for (let index = 0; index < path.length; index += 2) points.push([path[index]!, path[index + 1]!]);
    return points;
  });
  if (closed) return { type: 'Polygon', coordinates: positions.map((ring) => [...ring, ring[0]!]) };
  return positions[0]?.length === 1
    ? { type: 'MultiPoint', coordinates: positions.flat() }
    : { type: 'MultiLineString', coordinates: positions };
}
