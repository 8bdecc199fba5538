/** Times as the wire has them. */

const KEPT = 64;
const texts = new Map<number, string>();

/** RFC 3339 in UTC with milliseconds. The rows of one batch share a few times, so the last answers are kept. */
export function isoTime(ms: number): string {
  let text = texts.get(ms);
  if (text === undefined) {
    text = new Date(ms).toISOString();
    if (texts.size >= KEPT) texts.clear();
    texts.set(ms, text);
  }
  return text;
}

export function isoTimeOrNull(ms: number | null): string | null {
  return ms === null ? null : isoTime(ms);
}
