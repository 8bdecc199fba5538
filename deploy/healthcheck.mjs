/**
 * Exits 0 when the program in this container answers GET /health, else 1 with the reason. A node answers where
 * MILLRACE_METRICS says, a dispatcher at its default port.
 */
const port = process.env.MILLRACE_METRICS?.trim().split(':').at(-1) || '7070';
try {
  const response = await fetch(`http://127.0.0.1:${port}/health`, { signal: AbortSignal.timeout(4_000) });
  if (!response.ok) throw new Error(`status ${response.status}`);
} catch (error) {
  process.stderr.write(`GET /health at port ${port}: ${error.cause?.message ?? error.message}\n`);
  process.exitCode = 1;
}
