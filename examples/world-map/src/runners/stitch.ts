/**
 * Stage three: puts the tiles together. The picture is written while it is read, one row of tiles at a time, so its size
 * is bounded by the disk and not by memory.
 */
import { createHash } from 'node:crypto';
import { loadImage, createCanvas } from '@napi-rs/canvas';
import { MillraceError, defineRunner } from '@millrace/runner';
import type { TaskContext } from '@millrace/runner';
import { CAPABILITIES, readPlan, tileName, tilePlace } from '../plan.ts';
import type { MapPlan } from '../plan.ts';
import { RGB_BYTES, encodePng } from '../png.ts';
import { tileRect } from '../scene.ts';

export default defineRunner({
  capability: CAPABILITIES.stitch,

  async run(ctx) {
    const plan = readPlan(ctx.lease.task.meta);
    const tiles = await findTiles(ctx, plan);
    const hash = createHash('sha256');
    let bytes = 0;
    const measured = async function* (): AsyncGenerator<Uint8Array> {
      for await (const chunk of encodePng(plan.size.width, plan.size.height, strips(ctx, plan, tiles))) {
        hash.update(chunk);
        bytes += chunk.length;
        yield chunk;
      }
    };
    await ctx.output.putStream('map.png', measured());
    const summary = { ...plan.size, tiles: tiles.size, bytes, sha256: hash.digest('hex') };
    await ctx.output.putBytes('map.json', new TextEncoder().encode(`${JSON.stringify(summary, null, 2)}\n`));
  },
});

/** The file of each tile by its place. Every place has exactly one, or the picture would be wrong without a word. */
async function findTiles(ctx: TaskContext, { grid }: MapPlan): Promise<Map<string, string>> {
  const tiles = new Map<string, string>();
  const inputs = ctx.lease.task.inputs_cids;
  for (const [index, cid] of inputs.entries()) {
    ctx.signal.throwIfAborted();
    const { name, path } = await ctx.input.materializeCidWithMeta(cid);
    const place = tilePlace(name ?? '');
    if (!place || place.column >= grid.columns || place.row >= grid.rows) {
      throw new MillraceError(
        'invalid_argument',
        `input ${index} must be named after a tile of ${grid.columns}x${grid.rows}, got ${JSON.stringify(name)}`,
      );
    }
    const key = tileName(place.column, place.row);
    if (tiles.has(key)) throw new MillraceError('invalid_argument', `${key} is among the inputs twice`);
    tiles.set(key, path);
    await ctx.ctrl.progress({
      done: 0,
      total: grid.rows,
      message: `fetched ${index + 1} of ${inputs.length} tiles`,
    });
  }
  if (tiles.size !== grid.columns * grid.rows) {
    throw new MillraceError(
      'invalid_argument',
      `a map of ${grid.columns}x${grid.rows} needs ${grid.columns * grid.rows} tiles, got ${tiles.size}`,
    );
  }
  return tiles;
}

/** RGB rows of the picture, one row of tiles at a time. */
async function* strips(
  ctx: TaskContext,
  { size, grid }: MapPlan,
  tiles: ReadonlyMap<string, string>,
): AsyncGenerator<Uint8Array> {
  for (let row = 0; row < grid.rows; row += 1) {
    const strip = new Uint8Array(size.width * tileRect(size, grid, 0, row).height * RGB_BYTES);
    for (let column = 0; column < grid.columns; column += 1) {
      ctx.signal.throwIfAborted();
      const name = tileName(column, row);
      const rect = tileRect(size, grid, column, row);
      const image = await loadImage(tiles.get(name)!);
      if (image.width !== rect.width || image.height !== rect.height) {
        throw new MillraceError(
          'invalid_argument',
          `${name} must be ${rect.width} x ${rect.height} pixels, got ${image.width} x ${image.height}`,
        );
      }
      const context = createCanvas(rect.width, rect.height).getContext('2d');
      context.drawImage(image, 0, 0);
      const { data } = context.getImageData(0, 0, rect.width, rect.height);
      for (let y = 0; y < rect.height; y += 1) {
        let to = (y * size.width + rect.x) * RGB_BYTES;
        for (let from = y * rect.width * 4, end = from + rect.width * 4; from < end; from += 4) {
          strip[to] = data[from]!;
          strip[to + 1] = data[from + 1]!;
          strip[to + 2] = data[from + 2]!;
          to += RGB_BYTES;
        }
      }
    }
    yield strip;
    await ctx.ctrl.progress({ done: row + 1, total: grid.rows, unit: 'rows', message: 'stitching' });
  }
}
