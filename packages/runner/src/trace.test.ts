import { describe, expect, test } from 'vitest';
import { parseLease } from './decode.ts';
import { NO_TRACES, isTraceparent, parseTraceparent } from './trace.ts';

const TRACE = '0af7651916cd43dd8448eb211c80319c';
const SPAN = 'b7ad6b7169203331';

describe('a traceparent', () => {
  test('says trace, span and whether it is recorded', () => {
    expect(parseTraceparent(`00-${TRACE}-${SPAN}-01`)).toEqual({
      traceId: TRACE,
      spanId: SPAN,
      sampled: true,
    });
    expect(parseTraceparent(`00-${TRACE}-${SPAN}-00`)?.sampled).toBe(false);
    // Other flags may come; one bit is the one that counts.
    expect(parseTraceparent(`00-${TRACE}-${SPAN}-03`)?.sampled).toBe(true);
    expect(parseTraceparent(`00-${TRACE}-${SPAN}-02`)?.sampled).toBe(false);
  });

  test('of a later version may have more', () => {
    expect(parseTraceparent(`01-${TRACE}-${SPAN}-01-what-comes`)?.traceId).toBe(TRACE);
    expect(parseTraceparent(`00-${TRACE}-${SPAN}-01-what-comes`)).toBeNull();
    expect(parseTraceparent(`ff-${TRACE}-${SPAN}-01`)).toBeNull();
  });

  test.each([
    ['', undefined, null, 5, {}],
    [`00-${'0'.repeat(32)}-${SPAN}-01`, `00-${TRACE}-${'0'.repeat(16)}-01`],
    [
      `00-${TRACE.toUpperCase()}-${SPAN}-01`,
      `00-${TRACE}-${SPAN}`,
      `00-${TRACE}-${SPAN}-1`,
      ` 00-${TRACE}-${SPAN}-01`,
    ],
    [
      `00-${TRACE}x-${SPAN}-01`,
      `00-${TRACE.slice(1)}-${SPAN}-01`,
      `01-${TRACE}-${SPAN}-01-${'x'.repeat(300)}`,
    ],
  ])('is none: %j', (...values: unknown[]) => {
    for (const value of values) expect(isTraceparent(value)).toBe(false);
  });
});

test('a lease names its trace; what is none is as if it were not there', () => {
  const lease = { task: { id: '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11', capability: '/a/v1' } };
  const traceparent = `00-${TRACE}-${SPAN}-01`;
  expect(parseLease({ ...lease, traceparent }).traceparent).toBe(traceparent);
  for (const nonsense of ['nonsense', 5, null]) {
    expect(parseLease({ ...lease, traceparent: nonsense })).not.toHaveProperty('traceparent');
  }
});

test('without a tracer a context is handed on', () => {
  for (const parent of [`00-${TRACE}-${SPAN}-01`, null]) {
    const span = NO_TRACES.startSpan('x', { parent });
    span.end({ error: 'x' });
    expect(span.traceparent).toBe(parent);
  }
});
