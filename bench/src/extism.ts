/**
 * Extism beside our computes: the other library that runs WebAssembly plugins in Node.js, in the caller's thread and in a
 * worker. Its module speaks Extism's own interface instead of WASI and does the same: it gives its input back.
 */
import type { Plugin } from '@extism/extism';

/** (module … (func (export "echo") …)): 273 bytes, hand-written, over `input_length`, `input_load_u8`, `store_u8`. */
const ECHO = Buffer.from(
  'AGFzbQEAAAABHQZgAAF+YAF+AX9gAX4BfmACfn8AYAJ+fgBgAAF/ApABBQ9leHRpc206aG9zdC9lbnYMaW5wdXRfbGVuZ3RoAAAPZXh0aXNtOmhvc3QvZW52DWlucHV0X2xvYWRfdTgAAQ9leHRpc206aG9zdC9lbnYFYWxsb2MAAg9leHRpc206aG9zdC9lbnYIc3RvcmVfdTgAAw9leHRpc206aG9zdC9lbnYKb3V0cHV0X3NldAAEAwIBBQUDAQABBxECBm1lbW9yeQIABGVjaG8ABQo5ATcBA34QACEAIAAQAiEBAkADQCACIABaDQEgASACfCACEAEQAyACQgF8IQIMAAsLIAEgABAEQQAL',
  'base64',
);

export interface ExtismFigures {
  /** Milliseconds for each call of one plugin, whose instance is used again and again. */
  readonly reused: number[];
  /** Milliseconds for each call of a plugin made for it: an instance, and with `worker` a thread, of its own. */
  readonly fresh: number[];
}

/** Calls with `input`, `reused` times on one plugin and `fresh` times on a new one. */
export async function extism(
  input: string,
  where: 'thread' | 'worker',
  counts: { readonly reused: number; readonly fresh: number },
): Promise<ExtismFigures> {
  const figures: ExtismFigures = { reused: [], fresh: [] };
  const quiet = silenceWarnings();
  try {
    const { createPlugin } = await import('@extism/extism');
    const open = (): Promise<Plugin> =>
      createPlugin({ wasm: [{ data: ECHO }] }, { runInWorker: where === 'worker', useWasi: false });
    const plugin = await open();
    for (let index = -500; index < counts.reused; index += 1) {
      const begun = performance.now();
      const output = await plugin.call('echo', input);
      const took = performance.now() - begun;
      if (output?.text() !== input) throw new Error(`extism said ${output?.text()}`);
      if (index >= 0) figures.reused.push(took);
    }
    await plugin.close();
    for (let index = 0; index < counts.fresh; index += 1) {
      const begun = performance.now();
      const own = await open();
      await own.call('echo', input);
      figures.fresh.push(performance.now() - begun);
      await own.close();
    }
    return figures;
  } finally {
    quiet();
  }
}

/** It imports `node:wasi`, which says once per thread that it is experimental. */
function silenceWarnings(): () => void {
  const listeners = process.listeners('warning');
  const { NODE_NO_WARNINGS: before } = process.env;
  process.removeAllListeners('warning');
  process.env['NODE_NO_WARNINGS'] = '1';
  return () => {
    for (const listener of listeners) process.on('warning', listener);
    if (before === undefined) delete process.env['NODE_NO_WARNINGS'];
    else process.env['NODE_NO_WARNINGS'] = before;
  };
}
