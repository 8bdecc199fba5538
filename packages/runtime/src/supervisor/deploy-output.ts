/** What a runtime prints on `deploy` and `offer-template`, read as the supervisors in use read it. */
import { MillraceError, truncateUtf8, type JsonObject } from '@millrace/runner';
import { isObject } from '../sdk/canonical-json.ts';
import type { RuntimeMode, Volume } from '../sdk/runtime.ts';
import { checkVolume } from './volumes.ts';

export interface DeployOutput {
  readonly mode: RuntimeMode;
  readonly volumes: readonly Volume[];
}

/**
 * Everything before the first `{` is dropped; the object must be the rest. No output means command mode without volumes.
 *
 * @throws MillraceError `data_loss` for anything else, `invalid_argument` for a volume that may not be, `failed_precondition`
 * for a deployment that says it failed.
 */
export function parseDeployOutput(stdout: string): DeployOutput {
  if (stdout.trim() === '') return { mode: 'command', volumes: [] };
  const start = stdout.indexOf('{');
  if (start < 0) throw invalid(`no object in ${quoted(stdout)}`);
  let value: unknown;
  try {
    value = JSON.parse(stdout.slice(start));
  } catch (error) {
    throw invalid(notJson(error, stdout));
  }
  if (!isObject(value)) throw invalid(`no object in ${quoted(stdout)}`);
  const { valid, vols = [], startMode = 'empty' } = value;
  const outcome = isObject(valid) ? Object.entries(valid) : [];
  const [result, text] = outcome.length === 1 ? outcome[0]! : [];
  if (!(result === 'Ok' || result === 'Err') || typeof text !== 'string') {
    throw invalid(
      `valid must be {"Ok": text} or {"Err": text}, got ${shown(JSON.stringify(valid) ?? 'nothing')}`,
    );
  }
  if (startMode !== 'blocking' && startMode !== 'empty') {
    throw invalid(`startMode must be "blocking" or "empty", got ${shown(JSON.stringify(startMode))}`);
  }
  if (!Array.isArray(vols)) throw invalid(`vols must be an array, got ${shown(JSON.stringify(vols))}`);
  if (result === 'Err') {
    throw new MillraceError(
      'failed_precondition',
      `the runtime refused to deploy: ${truncateUtf8(text, 1000)}`,
    );
  }
  const volumes = vols.map((volume) => checkVolume(volume));
  return { mode: startMode === 'blocking' ? 'server' : 'command', volumes };
}

export interface OfferTemplate {
  readonly constraints: string;
  readonly properties: JsonObject;
}

export const EMPTY_OFFER: OfferTemplate = { constraints: '', properties: {} };

/**
 * One object with both members; what follows it is ignored.
 *
 * @throws MillraceError `data_loss` for anything else, an empty output included.
 */
export function parseOffer(stdout: string): OfferTemplate {
  const text = stdout.trimStart();
  let value: unknown;
  try {
    value = JSON.parse(text.slice(0, endOfObject(text)));
  } catch (error) {
    throw badOffer(notJson(error, stdout));
  }
  if (!isObject(value)) throw badOffer(`no object in ${quoted(stdout)}`);
  if (typeof value.constraints !== 'string') throw badOffer('constraints must be a text, "" for none');
  if (!isObject(value.properties)) throw badOffer('properties must be an object');
  return { constraints: value.constraints, properties: value.properties };
}

/** Where the object that starts the text ends; the text's length when it does not. */
function endOfObject(text: string): number {
  let depth = 0;
  let inText = false;
  for (let at = 0; at < text.length; at += 1) {
    const char = text[at];
    if (inText) {
      if (char === '\\') at += 1;
      else if (char === '"') inText = false;
    } else if (char === '"') inText = true;
    else if (char === '{') depth += 1;
    else if (char === '}' && (depth -= 1) === 0) return at + 1;
  }
  return text.length;
}

function invalid(rule: string): MillraceError {
  return new MillraceError('data_loss', `the output of deploy is invalid: ${rule}`);
}

function badOffer(rule: string): MillraceError {
  return new MillraceError('data_loss', `the output of offer-template is invalid: ${rule}`);
}

/** The parser's words, which quote what it read as it is, on one line. */
function notJson(error: unknown, stdout: string): string {
  return `${(error as Error).message.replace(/\s+/g, ' ')} in ${quoted(stdout)}`;
}

function quoted(text: string): string {
  return JSON.stringify(truncateUtf8(text, 200));
}

function shown(json: string): string {
  return truncateUtf8(json, 200);
}
