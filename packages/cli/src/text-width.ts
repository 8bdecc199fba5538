/**
 * How wide text is on a terminal, and text made safe for one. Labels, reasons and log lines come from other people:
 * nothing of theirs may move the cursor, recolour the screen or break a table.
 */

const graphemes = new Intl.Segmenter(undefined, { granularity: 'grapheme' });

// oxlint-disable-next-line no-control-regex -- escape sequences are what is looked for
const ESCAPES = /\u001b(?:\[[0-?]*[ -/]*[@-~]|\][^\u0007\u001b]*(?:\u0007|\u001b\\)|[@-Z\\-_])/gu;
// oxlint-disable-next-line no-control-regex -- control characters are exactly what is replaced
const CONTROLS = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu;
const ZERO_WIDTH = /^[\p{Mark}\p{Format}]+$/u;
const EMOJI = /\p{Emoji_Presentation}|\ufe0f/u;

/** Columns the text takes: wide East Asian characters and emoji two, combining marks and escape sequences none. */
export function textWidth(text: string): number {
  const plain = text.replace(ESCAPES, '');
  if (/^[ -~]*$/.test(plain)) return plain.length;
  let width = 0;
  for (const { segment } of graphemes.segment(plain)) width += graphemeWidth(segment);
  return width;
}

function graphemeWidth(grapheme: string): number {
  if (ZERO_WIDTH.test(grapheme)) return 0;
  if (EMOJI.test(grapheme)) return 2;
  const code = grapheme.codePointAt(0) ?? 0;
  return isWide(code) ? 2 : 1;
}

/** The blocks of Unicode whose characters are East Asian Wide or Fullwidth (UAX 11), coarsely. */
function isWide(code: number): boolean {
  return (
    (code >= 0x1100 && code <= 0x115f) ||
    (code >= 0x2e80 && code <= 0x303e) ||
    (code >= 0x3041 && code <= 0x33ff) ||
    (code >= 0x3400 && code <= 0x4dbf) ||
    (code >= 0x4e00 && code <= 0xa4cf) ||
    (code >= 0xa960 && code <= 0xa97f) ||
    (code >= 0xac00 && code <= 0xd7a3) ||
    (code >= 0xf900 && code <= 0xfaff) ||
    (code >= 0xfe30 && code <= 0xfe6f) ||
    (code >= 0xff00 && code <= 0xff60) ||
    (code >= 0xffe0 && code <= 0xffe6) ||
    (code >= 0x20000 && code <= 0x3fffd)
  );
}

/** Foreign text on one line: escape sequences removed, control and direction characters replaced by a space. */
export function oneLine(text: string): string {
  return text.replace(ESCAPES, '').replace(CONTROLS, ' ').trim();
}

/** A line that a program printed, as safe to show as {@link oneLine} makes it, its tabs and indentation kept. */
export function printable(text: string): string {
  return text.replace(ESCAPES, '').replace(CONTROLS, (char) => (char === '\t' ? char : ' '));
}

/** `text` cut to `width` columns, ending in `…` when something was cut. Text must not hold escape sequences. */
export function fitWidth(text: string, width: number): string {
  if (textWidth(text) <= width) return text;
  if (width <= 0) return '';
  let kept = '';
  let used = 0;
  for (const { segment } of graphemes.segment(text)) {
    const next = graphemeWidth(segment);
    if (used + next > width - 1) break;
    kept += segment;
    used += next;
  }
  return `${kept}…`;
}

/** `text` filled with spaces to `width` columns; longer text stays as it is. */
export function padWidth(text: string, width: number, side: 'left' | 'right' = 'right'): string {
  const fill = ' '.repeat(Math.max(0, width - textWidth(text)));
  return side === 'left' ? fill + text : text + fill;
}

export interface Column {
  readonly title: string;
  /** Numbers read best on the right. Default left. */
  readonly align?: 'left' | 'right';
}

/** Rows under their titles, aligned by display width, two spaces between columns, nothing after the last. */
export function table(
  columns: readonly Column[],
  rows: readonly (readonly string[])[],
  paintTitle: (text: string) => string = (text) => text,
): string[] {
  const widths = columns.map((column, index) =>
    Math.max(textWidth(column.title), ...rows.map((row) => textWidth(row[index] ?? ''))),
  );
  const line = (cells: readonly string[]): string =>
    columns
      .map((column, index) =>
        padWidth(cells[index] ?? '', widths[index] ?? 0, column.align === 'right' ? 'left' : 'right'),
      )
      .join('  ')
      .trimEnd();
  return [paintTitle(line(columns.map((column) => column.title))), ...rows.map(line)];
}
