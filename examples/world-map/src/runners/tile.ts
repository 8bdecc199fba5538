/** Stage two, one task per tile: paints the scene in input 0 and writes it as a PNG named after its place. */
import { setImmediate as turn } from 'node:timers/promises';
import { MillraceError, defineRunner } from '@millrace/runner';
import { paintTile } from '../paint.ts';
import { CAPABILITIES, tileName } from '../plan.ts';
import type { TileScene } from '../scene.ts';

/** Steps of {@link paintTile} and the encoding. */
const STEPS = 7;

export default defineRunner({
  capability: CAPABILITIES.tile,

  async run(ctx) {
    const { inputs_cids: inputs, meta } = ctx.lease.task;
    if (inputs.length !== 1) {
      throw new MillraceError(
        'invalid_argument',
        `${CAPABILITIES.tile} takes one scene, got ${inputs.length} inputs`,
      );
    }
    const { column, row } = readPlace(meta);
    const scene = readScene(await ctx.input.getBytesByCid(inputs[0]!));
    const painting = paintTile(scene);
    for (let done = 1; ; done += 1) {
      const step = painting.next();
      // Between steps the thread hears what came in meanwhile, such as an abort.
      await turn();
      ctx.signal.throwIfAborted();
      await ctx.ctrl.progress({ done, total: STEPS, message: step.done ? 'encoding' : step.value });
      if (!step.done) continue;
      await ctx.output.putBytes(`${tileName(column, row)}.png`, await step.value.encode('png'));
      return;
    }
  },
});

function readPlace(meta: unknown): { readonly column: number; readonly row: number } {
  const { column, row } = (meta ?? {}) as { readonly column?: unknown; readonly row?: unknown };
  if (!Number.isInteger(column) || !Number.isInteger(row)) {
    throw new MillraceError(
      'invalid_argument',
      `task.meta must have the integers column and row, got ${JSON.stringify(meta) ?? 'nothing'}`,
    );
  }
  return { column: Number(column), row: Number(row) };
}

/** Scenes are made by `prepare`; the format's name tells one from anything else. */
function readScene(bytes: Uint8Array): TileScene {
  let value: unknown = null;
  try {
    value = JSON.parse(new TextDecoder().decode(bytes));
  } catch (cause) {
    throw new MillraceError('invalid_argument', 'the scene is not JSON', { cause });
  }
  const scene = value as Partial<TileScene> | null;
  if (scene?.format !== 'millrace-world-map/tile/1') {
    throw new MillraceError(
      'invalid_argument',
      `the scene must have the format millrace-world-map/tile/1, got ${JSON.stringify(scene?.format) ?? 'none'}`,
    );
  }
  return scene as TileScene;
}
