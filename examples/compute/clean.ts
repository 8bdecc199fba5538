/** Leaves out what the sensor cannot have measured. */
import { plausible, type Readings } from './readings.ts';

export default function clean({ station, readings }: Readings): Readings & { readonly dropped: number } {
  const kept = readings.filter((reading) => plausible(reading.celsius));
  const dropped = readings.length - kept.length;
  if (dropped > 0) console.warn(`${station}: left out ${dropped} of ${readings.length} readings`);
  return { station, readings: kept, dropped };
}
