/** Shows a job's progress on a stream: redrawn in place on a terminal, a plain line every few seconds elsewhere. */
import type { JobEvent } from '@millrace/dispatch';
import { renderLine, renderLive, type JobView } from './progress.ts';
import { paint, terminalFeatures, type Env, type TextOut } from './terminal.ts';

const REDRAW_MS = 100;
const PLAIN_MS = 2_000;
/** Remarks between two plain lines; a thousand failing tasks are a count, not a thousand lines. */
const MAX_REMARKS = 5;

export class ProgressDisplay implements Disposable {
  readonly #view: JobView;
  readonly #out: TextOut;
  readonly #env: Env;
  readonly #now: () => number;
  readonly #live: boolean;
  readonly #timer: NodeJS.Timeout;
  #drawnLines = 0;
  #lastPlain = '';
  #remarks = 0;
  #closed = false;

  constructor(view: JobView, out: TextOut, env: Env, now: () => number) {
    this.#view = view;
    this.#out = out;
    this.#env = env;
    this.#now = now;
    this.#live = terminalFeatures(out, env).live;
    this.#timer = setInterval(() => this.#tick(), this.#live ? REDRAW_MS : PLAIN_MS);
    if (this.#live) this.#draw();
  }

  apply(event: JobEvent): void {
    const remark = this.#view.apply(event);
    if (remark === null) return;
    this.#remarks += 1;
    if (this.#remarks <= MAX_REMARKS) this.print(remark);
    else if (this.#remarks === MAX_REMARKS + 1) this.print('… and more');
  }

  /** A line that stays, above what is being redrawn. */
  print(line: string): void {
    this.#erase();
    this.#out.write(`${line}\n`);
    if (this.#live && !this.#closed) this.#draw();
  }

  /** Leaves the final state standing. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#timer);
    if (this.#live) this.#draw();
    else this.#plain();
    // What is printed from now on goes below.
    this.#drawnLines = 0;
  }

  #tick(): void {
    if (this.#live) this.#draw();
    else this.#plain();
    this.#remarks = 0;
  }

  #plain(): void {
    const line = renderLine(this.#view, this.#now());
    // The clock alone is no news.
    const news = line.replace(/^\[[\d:]+\] /, '');
    if (news === this.#lastPlain) return;
    this.#lastPlain = news;
    this.#out.write(`${line}\n`);
  }

  #draw(): void {
    const features = terminalFeatures(this.#out, this.#env);
    const lines = renderLive(this.#view, {
      nowMs: this.#now(),
      // The last column stays free: a full line would wrap on some terminals and break the counting of lines.
      width: features.width() - 1,
      height: Math.max(3, Math.min(24, (this.#out.rows ?? 24) - 2)),
      paint: paint(features.color),
    });
    // One write per frame, so that nothing is seen half drawn.
    const up = this.#drawnLines > 0 ? `\u001b[${this.#drawnLines}A` : '';
    this.#out.write(`${up}\r${lines.map((line) => `${line}\u001b[K\n`).join('')}\u001b[J`);
    this.#drawnLines = lines.length;
  }

  #erase(): void {
    if (this.#drawnLines === 0) return;
    this.#out.write(`\u001b[${this.#drawnLines}A\r\u001b[J`);
    this.#drawnLines = 0;
  }
}
