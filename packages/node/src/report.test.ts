import { parseLease } from '@millrace/runner/decode';
import { expect, test } from 'vitest';
import { completeReport, runnerFailedReport, type Report } from './report.ts';

const LEASE = parseLease({
  domain_id: '3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9',
  task: { id: '0f9a2b7c-1d3e-4f50-8a61-9b2c3d4e5f60', capability: '/test/v1' },
});

/** Each 1,024 bytes of JSON with its comma. */
function artifacts(count: number) {
  return Array.from({ length: count }, (_, index) => {
    const artifact = { logical_path: '', name: 'n', data_type: 'd', id: null };
    const path = String(index).padEnd(1023 - Buffer.byteLength(JSON.stringify(artifact)), 'x');
    return { ...artifact, logical_path: path };
  });
}

function detailsOf(report: Report) {
  if (report.kind !== 'fail' || !('artifacts' in report.body.details))
    throw new Error('no ending of a runner');
  return report.body.details;
}

test('a failure tells 60 KiB of artifacts in full, and of more how many are left out', () => {
  const sixty = detailsOf(runnerFailedReport(LEASE, artifacts(60), new Error('why')));
  expect([sixty.artifacts.length, sixty['artifacts_omitted']]).toEqual([60, undefined]);
  const more = detailsOf(runnerFailedReport(LEASE, artifacts(1000), new Error('why')));
  expect([more.artifacts.length, more['artifacts_omitted']]).toEqual([60, 940]);
  expect(Buffer.byteLength(JSON.stringify(more))).toBeLessThan(64 * 1024);
});

test('a completion tells all of them', () => {
  const report = completeReport(LEASE, artifacts(1000));
  expect(report.kind === 'complete' && report.body.meta.artifacts).toHaveLength(1000);
});
