/** Fuel of one invocation, as its host sees it. */
import type { GuestFailure } from '../pool/guest-engine.ts';

/** Fills the tank of a metered module's instance, and reads it afterwards. */
export class FuelGauge {
  readonly #max: number | null;
  #global: WebAssembly.Global | null = null;

  constructor(limits: { readonly maxFuel: number | null }) {
    this.#max = limits.maxFuel;
  }

  /** Before the guest's first instruction. `name` is the export that counts; `spent` was used before, by starting up. */
  attach(exports: Readonly<Record<string, unknown>>, name: string | null, spent = 0): void {
    if (name === null || this.#max === null) return;
    this.#global = exports[name] as WebAssembly.Global;
    this.#global.value = BigInt(this.#max - spent);
  }

  /** What was used, at most what there was; `null` when it is not counted. */
  get used(): number | null {
    const left = this.#left;
    return left === null || this.#max === null ? null : this.#max - Math.max(0, left);
  }

  /** How running out is reported; `null` while there is fuel. Whatever the guest ended with otherwise, this comes first. */
  failure(): GuestFailure | null {
    const left = this.#left;
    return left !== null && left < 0 ? outOfFuel(this.#max) : null;
  }

  get #left(): number | null {
    return this.#global === null ? null : Number(this.#global.value);
  }
}

export function outOfFuel(maxFuel: number | null): GuestFailure {
  return {
    code: 'resource_exhausted',
    reason: 'out-of-fuel',
    message: `guest used up its fuel, maxFuel ${maxFuel}`,
    details: { limit: 'maxFuel', value: maxFuel },
  };
}
