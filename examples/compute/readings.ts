/** What the station sends. Shared by the computes; it is bundled into each that imports it. */
export interface Reading {
  /** RFC 3339. */
  readonly at: string;
  /** Null: the sensor did not answer. */
  readonly celsius: number | null;
}

export interface Readings {
  readonly station: string;
  readonly readings: readonly Reading[];
}

/** A sensor without its probe reads −127, one that was just switched on 85. */
export function plausible(celsius: number | null): celsius is number {
  return celsius !== null && celsius > -60 && celsius < 60;
}
