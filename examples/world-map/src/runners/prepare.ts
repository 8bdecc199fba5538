/**
 * Stage one: reads the atlas (input 0) and the features to draw over it (input 1, if any), projects them, and writes for
 * each tile of the picture one scene with what lies on it.
 */
import { setImmediate as turn } from 'node:timers/promises';
import { MillraceError, defineRunner } from '@millrace/runner';
import type { TaskContext } from '@millrace/runner';
import { readAtlas, readFeatures } from '../geo.ts';
import { CAPABILITIES, placesOf, readPlan, tileName } from '../plan.ts';
import { partOf, projectPicture, sceneOf, tileRect } from '../scene.ts';
import type { Picture } from '../scene.ts';

export default defineRunner({
  capability: CAPABILITIES.prepare,

  async run(ctx) {
    const plan = readPlan(ctx.lease.task.meta);
    const [atlasCid, overlayCid, ...others] = ctx.lease.task.inputs_cids;
    if (atlasCid === undefined || others.length > 0) {
      throw new MillraceError(
        'invalid_argument',
        `${CAPABILITIES.prepare} takes the atlas and at most one file of features, got ${ctx.lease.task.inputs_cids.length} inputs`,
      );
    }
    const places = [...placesOf(plan.grid)];
    const total = places.length;
    await ctx.ctrl.progress({ done: 0, total, message: 'reading the atlas' });
    const atlas = readAtlas(await ctx.input.getBytesByCid(atlasCid));
    await breathe(ctx);
    const overlay =
      overlayCid === undefined
        ? []
        : readFeatures(await ctx.input.getBytesByCid(overlayCid), 'the file of features');
    ctx.log.info('read', { countries: atlas.countries.length, features: overlay.length });

    const projecting = projectPicture(atlas, { ...plan, overlay });
    let picture: Picture | null = null;
    while (picture === null) {
      const step = projecting.next();
      if (step.done) picture = step.value;
      else await ctx.ctrl.progress({ done: 0, total, message: `projecting: ${step.value}` });
      await breathe(ctx);
    }

    const { width } = plan.size;
    let band = picture;
    for (const [index, { column, row }] of places.entries()) {
      const rect = tileRect(plan.size, plan.grid, column, row);
      if (column === 0) band = partOf(picture, { ...rect, width });
      await ctx.output.putBytes(
        `tiles/${tileName(column, row)}.json`,
        new TextEncoder().encode(JSON.stringify(sceneOf(band, rect))),
      );
      await ctx.ctrl.progress({ done: index + 1, total, unit: 'tiles', message: 'cutting tiles' });
      await breathe(ctx);
    }
    const manifest = {
      projection: picture.projection,
      ...plan.size,
      ...plan.grid,
      countries: atlas.countries.length,
      features: overlay.length,
    };
    await ctx.output.putBytes(
      'manifest.json',
      new TextEncoder().encode(`${JSON.stringify(manifest, null, 2)}\n`),
    );
  },
});

/** Lets the thread hear what came in meanwhile, and stops if that was an abort. */
async function breathe(ctx: TaskContext): Promise<void> {
  await turn();
  ctx.signal.throwIfAborted();
}
