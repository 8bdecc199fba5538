import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { parseDeployOutput, parseOffer } from './deploy-output.ts';

describe('the output of deploy', () => {
  test.each([
    ['', 'command', 0],
    ['{"valid":{"Ok":"x"}}', 'command', 0],
    ['starting…\n[info] ok\n{"valid":{"Ok":""},"startMode":"blocking"}', 'server', 0],
    ['{"valid":{"Ok":""},"startMode":"empty","vols":[{"name":"v","path":"/in"}],"more":1} \n', 'command', 1],
    ['{"valid":{"Ok":""},"start_mode":"blocking"}', 'command', 0],
  ])('%j is understood', (stdout, mode, volumes) => {
    const output = parseDeployOutput(stdout);
    expect(output.mode).toBe(mode);
    expect(output.volumes).toHaveLength(volumes);
  });

  test.each([
    ['INFO {x} hello\n{"valid":{"Ok":""}}', 'in "INFO {x} hello\\n{'],
    ['{"valid":{"Ok":""}} done', 'done'],
    ['ready', 'no object in "ready"'],
    ['{}', 'valid must be'],
    ['{"valid":"ok"}', 'valid must be'],
    ['{"valid":{"Ok":"","Err":""}}', 'valid must be'],
    ['{"valid":{"Ok":""},"vols":null}', 'vols must be an array'],
    ['{"valid":{"Ok":""},"startMode":null}', 'startMode must be'],
    ['{"valid":{"Ok":""},"startMode":"Blocking"}', 'startMode must be "blocking" or "empty", got "Blocking"'],
    ['{"valid":{"Ok":""},"vols":[{"name":"v"}]}', 'the path of volume v must be absolute'],
    ['{"valid":{"Ok":""},"vols":[{"name":"..","path":"/in"}]}', 'one folder name, got ".."'],
    ['{"valid":{"Ok":""},"vols":[{"name":"../up","path":"/in"}]}', 'one folder name, got "../up"'],
    ['{"valid":{"Ok":""},"vols":[{"name":"v","path":"/in/../etc"}]}', 'without "." or ".."'],
    ['{"valid":{"Err":"bad image"},"startMode":"blocking"}', 'the runtime refused to deploy: bad image'],
  ])('%j is refused', (stdout, message) => {
    expect(() => parseDeployOutput(stdout)).toThrow(message);
  });

  test('that is not as it must be is no fault of whoever deploys, and told on one line', () => {
    const error = thrown(() => parseDeployOutput('ready\nfor {\n'));
    expect(error.code).toBe('data_loss');
    expect(error.message).not.toContain('\n');
  });
});

describe('the output of offer-template', () => {
  test.each([
    '{"constraints":"","properties":{}}',
    '  {"constraints":"","properties":{}}\n',
    '{"constraints":"","properties":{}}\u0000junk',
  ])('%j is understood', (stdout) => {
    expect(parseOffer(stdout)).toEqual({ constraints: '', properties: {} });
  });

  test('may hold braces and quotes in its texts', () => {
    const offer = { constraints: '(a="}{\\")', properties: { 'x.y': { z: ['"'] } } };
    expect(parseOffer(`${JSON.stringify(offer)} }}}`)).toEqual(offer);
  });

  test.each([
    ['', 'offer-template is invalid'],
    ['ready\n', 'in "ready\\n"'],
    ['[]', 'no object'],
    ['{"properties":{}}', 'constraints must be a text'],
    ['{"constraints":"","properties":[]}', 'properties must be an object'],
  ])('%j is refused', (stdout, message) => {
    const error = thrown(() => parseOffer(stdout));
    expect(error.code).toBe('data_loss');
    expect(error.message).toContain(message);
    expect(error.message).not.toContain('\n');
  });
});

function thrown(work: () => unknown): MillraceError {
  try {
    work();
  } catch (error) {
    if (MillraceError.is(error)) return error;
  }
  throw new Error('nothing was thrown');
}
