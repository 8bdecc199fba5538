/**
 * What the three stages agree on: their capabilities, the names of the artifacts between them, and their parameters.
 * Parameters come as `task.meta` from outside, so each runner reads them through here.
 */
import { MillraceError } from '@millrace/runner';
import type { Json } from '@millrace/runner';
import type { Grid, PictureSize } from './scene.ts';

export const CAPABILITIES = {
  prepare: '/examples/world-map/prepare/v1',
  tile: '/examples/world-map/tile/v1',
  stitch: '/examples/world-map/stitch/v1',
} as const;

export const BOUNDS = { width: { min: 64, max: 65_536 }, tiles: { min: 1, max: 1024 } } as const;

/** Parameters of the stages `prepare` and `stitch`. */
export interface MapPlan {
  readonly size: PictureSize;
  readonly grid: Grid;
  /** Look at the overlay only. */
  readonly fit: boolean;
}

/** A picture twice as wide as it is high. @throws MillraceError `invalid_argument` */
export function planMap(width: number, grid: Grid, fit: boolean): MapPlan {
  return readPlan({ width, height: Math.round(width / 2), columns: grid.columns, rows: grid.rows, fit });
}

/** The plan as `task.meta`. */
export function planMeta({ size, grid, fit }: MapPlan): { [key: string]: Json } {
  return { ...size, ...grid, fit };
}

/** The plan of a task's meta. @throws MillraceError `invalid_argument` naming the parameter, the rule and the value. */
export function readPlan(meta: Json): MapPlan {
  if (typeof meta !== 'object' || meta === null || Array.isArray(meta)) {
    throw new MillraceError(
      'invalid_argument',
      'task.meta must be an object with width, height, columns and rows',
    );
  }
  const integer = (name: string, { min, max }: { readonly min: number; readonly max: number }): number => {
    const value = meta[name];
    if (typeof value === 'number' && Number.isInteger(value) && value >= min && value <= max) return value;
    throw new MillraceError(
      'invalid_argument',
      `task.meta.${name} must be an integer from ${min} to ${max}, got ${JSON.stringify(value) ?? 'nothing'}`,
    );
  };
  const size = { width: integer('width', BOUNDS.width), height: integer('height', { min: 32, max: 65_536 }) };
  const grid = { columns: integer('columns', BOUNDS.tiles), rows: integer('rows', BOUNDS.tiles) };
  const count = grid.columns * grid.rows;
  if (count > BOUNDS.tiles.max || grid.columns > size.width || grid.rows > size.height) {
    throw new MillraceError(
      'invalid_argument',
      `${grid.columns}x${grid.rows} tiles must be at most ${BOUNDS.tiles.max}, each at least a pixel, got ${count} for ` +
        `${size.width} x ${size.height} pixels`,
    );
  }
  return { size, grid, fit: meta['fit'] === true };
}

const twoDigits = (value: number): string => String(value).padStart(2, '0');

/** The part of a tile's artifact names that says where it belongs. */
export function tileName(column: number, row: number): string {
  return `tile-${twoDigits(column)}-${twoDigits(row)}`;
}

/** The place in a name made by {@link tileName}, also in the middle of a longer one; null when there is none. */
export function tilePlace(name: string): { readonly column: number; readonly row: number } | null {
  const match = /tile-(\d{2,4})-(\d{2,4})/.exec(name);
  return match ? { column: Number(match[1]), row: Number(match[2]) } : null;
}

/** Every place of a grid, row by row. */
export function* placesOf({
  columns,
  rows,
}: Grid): Generator<{ readonly column: number; readonly row: number }> {
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) yield { column, row };
  }
}
