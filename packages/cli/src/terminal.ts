/** What the other end of a stream can show: colour, redrawing, width. Decided in one place, from facts handed in. */

/** The little of a writable stream that printing needs. */
export interface TextOut {
  write(text: string): unknown;
  readonly isTTY?: boolean;
  readonly columns?: number;
  readonly rows?: number;
}

export type Env = Readonly<Record<string, string | undefined>>;

export interface TerminalFeatures {
  readonly color: boolean;
  /** Lines may be drawn over. False for files, pipes, `TERM=dumb` and CI, which get plain lines instead. */
  readonly live: boolean;
  /** Columns now; a window can be resized. */
  width(): number;
}

/**
 * `NO_COLOR` (any non-empty value) switches colour off, `FORCE_COLOR` (other than `0`) on, in this order; else a terminal
 * that is not `TERM=dumb` has it.
 */
export function terminalFeatures(stream: TextOut, env: Env): TerminalFeatures {
  const terminal = stream.isTTY === true && env['TERM'] !== 'dumb';
  const forced = env['FORCE_COLOR'];
  return {
    color: env['NO_COLOR'] ? false : forced !== undefined && forced !== '' ? forced !== '0' : terminal,
    live: terminal && !env['CI'],
    width() {
      const columns = stream.columns ?? Number(env['COLUMNS']);
      return Number.isInteger(columns) && columns > 0 ? columns : 80;
    },
  };
}

export type Paint = Readonly<
  Record<'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan', (text: string) => string>
>;

/** Colouring functions; without colour each returns its text as it is. */
export function paint(color: boolean): Paint {
  const style =
    (on: number, off: number) =>
    (text: string): string =>
      color && text !== '' ? `\u001b[${on}m${text}\u001b[${off}m` : text;
  return {
    bold: style(1, 22),
    dim: style(2, 22),
    red: style(31, 39),
    green: style(32, 39),
    yellow: style(33, 39),
    cyan: style(36, 39),
  };
}
