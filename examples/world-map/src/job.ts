/** The job: three stages, where `tile` is as many tasks as the picture has tiles. */
import type { JobSubmission, TaskDraft } from '@millrace/dispatch/client';
import { CAPABILITIES, placesOf, planMeta, tileName } from './plan.ts';
import type { MapPlan } from './plan.ts';

/**
 * Builds the job.
 *
 * @param inputs data ids of the uploaded atlas and, if any, of the features to draw over it
 */
export function buildJob(
  plan: MapPlan,
  inputs: { readonly atlas: string; readonly overlay: string | null },
): JobSubmission {
  const meta = planMeta(plan);
  const tiles = [...placesOf(plan.grid)].map(({ column, row }): TaskDraft => {
    const name = tileName(column, row);
    return {
      label: name,
      stage: 'tile',
      capability: CAPABILITIES.tile,
      // Only its own scene, out of all that the first stage wrote.
      inputs_cids: [`stage:prepare/tiles/${name}.json`],
      meta: { column, row },
    };
  });
  return {
    label: `world map ${plan.size.width} x ${plan.size.height}`,
    tasks: [
      {
        label: 'prepare',
        stage: 'prepare',
        capability: CAPABILITIES.prepare,
        inputs_cids: inputs.overlay === null ? [inputs.atlas] : [inputs.atlas, inputs.overlay],
        meta,
      },
      ...tiles,
      {
        label: 'stitch',
        stage: 'stitch',
        capability: CAPABILITIES.stitch,
        inputs_cids: ['stage:tile/*.png'],
        meta,
      },
    ],
    edges: [
      { from: 'prepare', to: 'tile' },
      { from: 'tile', to: 'stitch' },
    ],
  };
}
