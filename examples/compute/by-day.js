/** Lowest, highest and mean temperature of each day. Plain JavaScript is as good. */
export default function byDay({ station, readings }) {
  const days = new Map();
  for (const { at, celsius } of readings) {
    const day = at.slice(0, 10);
    days.set(day, [...(days.get(day) ?? []), celsius]);
  }
  return {
    station,
    days: [...days].map(([day, values]) => ({
      day,
      low: Math.min(...values),
      high: Math.max(...values),
      mean: Math.round((10 * values.reduce((sum, value) => sum + value, 0)) / values.length) / 10,
    })),
  };
}
