/** How often each fault is tried, and the count of it, which is printed when a file is through. */

const FACTOR = Number(process.env['MILLRACE_FAULT_ROUNDS'] ?? 1);

/** `usual` rounds, times `MILLRACE_FAULT_ROUNDS` for a long run. */
export function rounds(usual: number): number {
  return Math.max(1, Math.round(usual * FACTOR));
}

/** Rounds by what went wrong in them, and what was lost. */
export class RoundCount {
  readonly #place: string;
  readonly #counts = new Map<string, { rounds: number; losses: number }>();

  /** `place` names the store or the test. */
  constructor(place: string) {
    this.#place = place;
  }

  /** One round is through, with so many losses. */
  add(fault: string, losses = 0): void {
    const count = this.#counts.get(fault) ?? { rounds: 0, losses: 0 };
    this.#counts.set(fault, { rounds: count.rounds + 1, losses: count.losses + losses });
  }

  print(): void {
    for (const [fault, { rounds: tried, losses }] of this.#counts) {
      process.stdout.write(`faults, ${this.#place}: ${fault}: ${tried} rounds, ${losses} losses\n`);
    }
  }
}
