/**
 * What a JavaScript compute finds besides the language: `console`, timers that do not wait, `TextEncoder` and
 * `TextDecoder`, `performance.now`, `queueMicrotask`; and how it is started and called. It runs inside of the sandbox, before
 * the compute's own code, and holds on to the built-ins it uses: whatever a compute does to them, it does to itself.
 *
 * The one thing from outside is the function `host(operation, text)`.
 */
export const HOST = {
  /** A line of diagnostics. */
  log: 0,
  /** The result, JSON. */
  result: 1,
  /** It failed: name, message and stack of what was thrown. */
  error: 2,
  /** What was returned is no JSON. */
  notJson: 3,
  /** Milliseconds of the monotonic clock. */
  clock: 4,
} as const;

/** Functions the prelude returns, in this order. */
export const DRIVER = { start: 0, invoke: 1, tick: 2, fail: 3 } as const;

/** Timers a compute may have set at once. */
const MAX_TIMERS = 10_000;

export const PRELUDE = `(function (host) {
  'use strict';
  const { parse, stringify } = JSON;
  const { defineProperty } = Object;
  const { min, max } = Math;
  const call = Function.prototype.call.bind(Function.prototype.call);
  const { charCodeAt, indexOf, lastIndexOf, replaceAll, slice, trimEnd } = String.prototype;
  const { fromCharCode } = String;
  const { apply } = Reflect;
  const set = (name, value) => defineProperty(globalThis, name, { value, writable: true, configurable: true });
  const isObject = (value) => typeof value === 'object' && value !== null;
  // Text goes out as a C string.
  const line = (text) => call(replaceAll, text, '\\0', '\\\\0');

  // Those of the compute: what called it is in here.
  const frames = (stack) => {
    const at = call(indexOf, stack, '(millrace:prelude:');
    return at < 0 ? stack : call(slice, stack, 0, max(0, call(lastIndexOf, stack, '\\n', at)));
  };
  // A thrown value in words. Reading it may throw again.
  const explain = (thrown) => {
    try {
      if (!isObject(thrown)) return typeof thrown === 'string' ? thrown : String(thrown);
      const { name, message, stack, cause } = thrown;
      if (name === undefined && message === undefined) return show(thrown);
      let text = String(name ?? 'Error');
      if (message !== undefined && message !== '') text += ': ' + String(message);
      if (typeof stack === 'string' && stack !== '') text += '\\n' + frames(stack);
      text = call(trimEnd, text);
      if (cause !== undefined) text += '\\ncaused by ' + explain(cause);
      return text;
    } catch {
      return 'an error that cannot be read';
    }
  };
  const show = (value) => {
    if (typeof value === 'string') return value;
    if (typeof value === 'bigint') return value + 'n';
    if (typeof value === 'function') return '[function ' + value.name + ']';
    if (!isObject(value)) return String(value);
    if (value instanceof Error) return explain(value);
    try {
      return stringify(value) ?? '[object]';
    } catch (error) {
      return '[object, ' + explain(error) + ']';
    }
  };

  const console = {};
  for (const [name, level] of [
    ['debug', 'debug'], ['trace', 'debug'], ['log', 'info'], ['info', 'info'], ['warn', 'warn'], ['error', 'error'],
  ]) {
    defineProperty(console, name, {
      value: (...values) => {
        let text = '[' + level + ']';
        for (let index = 0; index < values.length; index += 1) text += ' ' + show(values[index]);
        host(${HOST.log}, line(text) + '\\n');
      },
      writable: true, configurable: true, enumerable: true,
    });
  }
  set('console', console);

  // sfc32, started from 64 bits.
  let a = 0, b = 0, c = 0, d = 0;
  const draw = () => {
    const t = (a + b + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t | 0;
    return t >>> 0;
  };
  const seed = (high, low) => {
    a = high | 0; b = low | 0; c = 0x9e3779b9 | 0; d = 1;
    for (let round = 0; round < 12; round += 1) draw();
  };
  defineProperty(Math, 'random', {
    value: { random: () => (draw() * 2097152 + (draw() >>> 11)) / 9007199254740992 }.random,
    writable: true, configurable: true,
  });

  // Nobody waits: when nothing else is left to do, the timer that is due first has rung.
  let timers = [];
  let lastTimer = 0;
  let skipped = 0;
  const addTimer = (callback, delay, every, values) => {
    if (typeof callback !== 'function') throw new TypeError('a timer needs a function');
    if (timers.length >= ${MAX_TIMERS}) throw new RangeError('more than ${MAX_TIMERS} timers');
    const wait = max(0, min(2147483647, +delay || 0));
    lastTimer += 1;
    timers[timers.length] = { id: lastTimer, due: skipped + wait, wait: max(1, wait), every, callback, values };
    return lastTimer;
  };
  const clearTimer = (id) => {
    const kept = [];
    for (let index = 0; index < timers.length; index += 1) {
      if (timers[index].id !== id) kept[kept.length] = timers[index];
    }
    timers = kept;
  };
  set('setTimeout', (callback, delay, ...values) => addTimer(callback, delay, false, values));
  set('setInterval', (callback, delay, ...values) => addTimer(callback, delay, true, values));
  set('clearTimeout', clearTimer);
  set('clearInterval', clearTimer);
  const resolved = Promise.resolve();
  const then = Promise.prototype.then;
  set('queueMicrotask', (callback) => {
    if (typeof callback !== 'function') throw new TypeError('queueMicrotask needs a function');
    call(then, resolved, () => {
      try {
        callback();
      } catch (error) {
        fail(error);
      }
    });
  });
  set('performance', { now: () => host(${HOST.clock}) + skipped });

  set('TextEncoder', class TextEncoder {
    get encoding() { return 'utf-8'; }
    encode(input = '') {
      const text = String(input);
      const bytes = new Uint8Array(text.length * 3);
      let at = 0;
      for (let index = 0; index < text.length; index += 1) {
        let code = call(charCodeAt, text, index);
        if (code < 0x80) { bytes[at++] = code; continue; }
        if (code < 0x800) { bytes[at++] = 0xc0 | (code >> 6); bytes[at++] = 0x80 | (code & 63); continue; }
        if (code >= 0xd800 && code < 0xe000) {
          const next = index + 1 < text.length ? call(charCodeAt, text, index + 1) : 0;
          if (code < 0xdc00 && next >= 0xdc00 && next < 0xe000) {
            index += 1;
            code = 0x10000 + ((code & 0x3ff) << 10) + (next & 0x3ff);
            bytes[at++] = 0xf0 | (code >> 18); bytes[at++] = 0x80 | ((code >> 12) & 63);
            bytes[at++] = 0x80 | ((code >> 6) & 63); bytes[at++] = 0x80 | (code & 63);
            continue;
          }
          code = 0xfffd;
        }
        bytes[at++] = 0xe0 | (code >> 12); bytes[at++] = 0x80 | ((code >> 6) & 63); bytes[at++] = 0x80 | (code & 63);
      }
      return bytes.slice(0, at);
    }
  });
  set('TextDecoder', class TextDecoder {
    #fatal; #keepMark;
    constructor(label = 'utf-8', { fatal = false, ignoreBOM = false } = {}) {
      const name = String(label).toLowerCase();
      if (name !== 'utf-8' && name !== 'utf8') throw new RangeError('TextDecoder knows utf-8, not ' + name);
      this.#fatal = Boolean(fatal);
      this.#keepMark = Boolean(ignoreBOM);
    }
    get encoding() { return 'utf-8'; }
    get fatal() { return this.#fatal; }
    get ignoreBOM() { return this.#keepMark; }
    decode(input = new Uint8Array(0)) {
      const bytes = input instanceof ArrayBuffer ? new Uint8Array(input)
        : new Uint8Array(input.buffer, input.byteOffset, input.byteLength);
      let text = '';
      let codes = [];
      let at = 0;
      if (!this.#keepMark && bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) at = 3;
      while (at < bytes.length) {
        const first = bytes[at];
        let code = first;
        let more = 0;
        let low = 0x80, high = 0xbf;
        if (first >= 0x80) {
          if (first >= 0xc2 && first < 0xe0) { more = 1; code = first & 31; }
          else if (first >= 0xe0 && first < 0xf0) {
            more = 2; code = first & 15;
            if (first === 0xe0) low = 0xa0;
            if (first === 0xed) high = 0x9f;
          } else if (first >= 0xf0 && first < 0xf5) {
            more = 3; code = first & 7;
            if (first === 0xf0) low = 0x90;
            if (first === 0xf4) high = 0x8f;
          } else more = -1;
        }
        at += 1;
        let valid = more >= 0;
        for (; more > 0; more -= 1) {
          const next = bytes[at];
          if (!(next >= low && next <= high)) { valid = false; break; }
          code = (code << 6) | (next & 63);
          low = 0x80; high = 0xbf;
          at += 1;
        }
        if (!valid) {
          if (this.#fatal) throw new TypeError('the bytes are not UTF-8');
          code = 0xfffd;
        }
        if (code > 0xffff) {
          code -= 0x10000;
          codes[codes.length] = 0xd800 | (code >> 10);
          code = 0xdc00 | (code & 0x3ff);
        }
        codes[codes.length] = code;
        if (codes.length >= 1024) { text += apply(fromCharCode, null, codes); codes = []; }
      }
      return text + apply(fromCharCode, null, codes);
    }
  });

  let handler = null;
  const fail = (thrown) => host(${HOST.error}, line(explain(thrown)));
  const settle = (value) => {
    // The reference's rule: nothing is null.
    const text = value === undefined ? 'null' : stringify(value);
    if (text === undefined) host(${HOST.notJson}, 'a ' + typeof value);
    else host(${HOST.result}, text);
  };
  seed(0x01234567, 0x89abcdef);
  return [
    async (module) => {
      try {
        const { default: found } = await module;
        if (typeof found !== 'function') {
          throw new TypeError('the default export must be a function, it is ' + (found === undefined ? 'missing' : 'a ' + typeof found));
        }
        handler = found;
        host(${HOST.result}, '');
      } catch (error) {
        fail(error);
      }
    },
    async (text, high, low) => {
      seed(high, low);
      try {
        settle(await handler(parse(text)));
      } catch (error) {
        fail(error);
      }
    },
    () => {
      let next = null;
      for (let index = 0; index < timers.length; index += 1) {
        if (next === null || timers[index].due < next.due) next = timers[index];
      }
      if (next === null) return 0;
      skipped = max(skipped, next.due);
      if (next.every) next.due = skipped + next.wait;
      else clearTimer(next.id);
      try {
        apply(next.callback, undefined, next.values);
      } catch (error) {
        fail(error);
      }
      return 1;
    },
    fail,
  ];
})`;
