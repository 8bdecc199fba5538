import type { JobDetail, JobEvent } from '@millrace/dispatch';
import { describe, expect, test } from 'vitest';
import { JobView } from './progress.ts';
import { ProgressDisplay } from './progress-display.ts';

/** A terminal that understands what the display sends: up, carriage return, clear line, clear below. */
class Screen {
  readonly isTTY = true;
  readonly columns = 60;
  readonly rows = 24;
  readonly #lines: string[] = [''];
  #row = 0;

  write(text: string): void {
    // oxlint-disable-next-line no-control-regex -- a terminal is told by control characters
    for (const [part] of text.matchAll(/\u001b\[\d*[AKJ]|\n|\r|[^\u001b\n\r]+/gu)) {
      if (part === '\n') this.#lines[(this.#row += 1)] ??= '';
      else if (part === '\r') continue;
      else if (part.endsWith('A') && part.startsWith('\u001b')) this.#row -= Number(part.slice(2, -1));
      else if (part === '\u001b[K') this.#lines[this.#row] = this.#written;
      else if (part === '\u001b[J') this.#lines.splice(this.#row, this.#lines.length, '');
      else this.#lines[this.#row] = this.#written = part;
      if (part === '\n') this.#written = '';
    }
  }
  #written = '';

  get lines(): string[] {
    return this.#lines.slice(0, -1);
  }
}

const AT = '2026-03-02T12:00:00.000Z';
const NOW = Date.parse(AT);

function viewOf(count: number): JobView {
  const tasks = Array.from({ length: count }, (_, index) => ({
    id: `t${index}`,
    stage: `s${index}`,
    label: '',
  }));
  const detail = { job: { id: 'j', label: 'demo', created_at: AT, edges: [] }, tasks };
  return new JobView(detail as unknown as JobDetail);
}

const event = (kind: string, task_id: string | null, data: JobEvent['data'] = {}): JobEvent => ({
  seq: 1,
  at: AT,
  kind,
  task_id,
  data,
});

describe('on a terminal', () => {
  test('the same lines are drawn over, and remarks stay above them', () => {
    const screen = new Screen();
    const view = viewOf(2);
    {
      using display = new ProgressDisplay(view, screen, { NO_COLOR: '1' }, () => NOW);
      display.apply(event('task.leased', 't0', { attempt: 1 }));
      display.apply(event('task.failed', 't0', { reason: 'no' }));
      display.print('warn: something');
      display.apply(event('task.completed', 't1'));
      display.apply(event('job.failed', null));
    }
    expect(screen.lines).toEqual([
      's0: failed: no',
      'warn: something',
      '✗ demo  1/2 tasks  1 failed  failed  00:00',
      '  ✗ s0  0 ms  no',
      '  ✓ s1',
    ]);
  });

  test('what is printed after the end goes below and erases nothing', () => {
    const screen = new Screen();
    const display = new ProgressDisplay(viewOf(1), screen, { NO_COLOR: '1' }, () => NOW);
    display.apply(event('job.completed', null));
    display[Symbol.dispose]();
    display[Symbol.dispose]();
    display.print('later');
    expect(screen.lines).toEqual(['✓ demo  0/1 task  completed  00:00', '  · s0  waits for a node', 'later']);
  });
});

describe('in a file or pipe', () => {
  test('there are whole lines without escape sequences, and remarks have a bound', () => {
    let text = '';
    const out = { write: (more: string) => (text += more) };
    {
      using display = new ProgressDisplay(viewOf(9), out, {}, () => NOW);
      for (let index = 0; index < 9; index += 1) {
        display.apply(event('task.failed', `t${index}`, { reason: 'no' }));
      }
      display.apply(event('job.failed', null));
    }
    expect(text.split('\n')).toEqual([
      ...[0, 1, 2, 3, 4].map((index) => `s${index}: failed: no`),
      '… and more',
      '[00:00] demo: 0/9 tasks done; 9 failed; failed',
      '',
    ]);
  });
});
