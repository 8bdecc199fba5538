/** Stack traces of a built compute, in terms of its sources. */
import { SourceMap } from 'node:module';
import type { SourceMapPayload } from 'node:module';

const POSITION = /\(compute\.js:(\d+):(\d+)\)/g;

/** The text with every `(compute.js:line:column)` replaced by where that is in the sources. */
export function mapTrace(text: string, sourceMap: string): string {
  const map = new SourceMap(JSON.parse(sourceMap) as SourceMapPayload);
  return text.replace(POSITION, (position, line: string, column: string) => {
    // Both count from 0 in a source map.
    const found = map.findEntry(Number(line) - 1, Number(column) - 1);
    if (!('originalSource' in found) || found.originalSource === undefined) return position;
    const source = found.originalSource.replace(/^compute:/, '');
    return `(${source}:${found.originalLine + 1}:${found.originalColumn + 1})`;
  });
}
