/** The worker side of {@link WasiCommands}: one WASI command with its grants, a fresh instance for each call. */
import type { GuestCall, GuestEngine, GuestOutcome } from '../pool/guest-engine.ts';
import { FuelGauge } from '../fuel/gauge.ts';
import { prepare, trapOf, type PreparedWasm } from '../wasm/guest.ts';
import { WASI_MODULE } from '../wasm/wasi-types.ts';
import { Wasi } from '../wasm/wasi.ts';
import { CommandHost } from './host.ts';
import type { CommandReport, CommandRequest } from './messages.ts';

const wasi = new Wasi();

function run(prepared: PreparedWasm, call: GuestCall): GuestOutcome {
  const request = JSON.parse(Buffer.from(call.input).toString()) as CommandRequest;
  // Its standard input is empty.
  wasi.begin({ ...call, input: new Uint8Array(0) });
  const gauge = new FuelGauge(call.limits);
  using host = new CommandHost(wasi, call, request);
  try {
    let thrown: unknown = null;
    try {
      const { exports } = new WebAssembly.Instance(prepared.module, { [WASI_MODULE]: host.functions });
      if (prepared.memory !== null) host.attach(exports[prepared.memory] as WebAssembly.Memory);
      gauge.attach(exports, prepared.fuel);
      call.note(wasi.memoryBytes, 0);
      for (const entry of prepared.entries) (exports[entry] as () => unknown)();
    } catch (error) {
      thrown = error ?? new Error('nothing');
    }
    const { memoryBytes } = wasi;
    const failure = gauge.failure();
    const report = failure === null ? reportOf(thrown, memoryBytes, host, call) : null;
    return {
      memoryBytes,
      outputBytes: 0,
      output: report === null ? null : Uint8Array.from(Buffer.from(JSON.stringify(report))),
      failure,
      fuelUsed: gauge.used,
    };
  } finally {
    wasi.end();
  }
}

/** What ended it first counts, whatever was thrown afterwards. */
function reportOf(thrown: unknown, memoryBytes: number, host: CommandHost, call: GuestCall): CommandReport {
  if (host.breach !== null) return { output: host.breach.bytes };
  if (wasi.halt?.kind === 'exit') return { exit: wasi.halt.code };
  if (thrown === null) return { exit: 0 };
  const { message, details } = trapOf(thrown, memoryBytes, call.limits);
  const trace = details?.['trace'];
  return { trap: message, trace: Array.isArray(trace) ? (trace as string[]) : [] };
}

export const guest: GuestEngine = { prepare, run };
