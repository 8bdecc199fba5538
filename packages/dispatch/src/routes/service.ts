/** What says what this server is: health, metrics, keys, and a page for the person who opens it in a browser. */
import type { FastifyInstance } from 'fastify';
import { ReadinessProbe } from '../readiness.ts';
import { VERSION } from '../version.ts';
import type { ServerContext } from './context.ts';

export function registerServiceRoutes(app: FastifyInstance, context: ServerContext): void {
  app.get('/health', () => ({
    status: 'ok',
    version: VERSION,
    domain_id: context.defaultDomainId,
  }));

  const probe = new ReadinessProbe(context);
  app.get('/ready', async (_request, reply) => {
    const parts = await probe.check();
    const ready = parts.store === 'ok' && parts.blobs === 'ok';
    return reply.code(ready ? 200 : 503).send({ status: ready ? 'ok' : 'unavailable', ...parts });
  });

  app.get('/metrics', async (_request, reply) => {
    const { contentType, text } = await context.metrics.render();
    return reply.type(contentType).send(text);
  });

  app.get('/service/public-key', () => context.tokens.publicKey.jwk);

  app.get('/service/public-key.pem', (_request, reply) =>
    reply.type('application/x-pem-file').send(context.tokens.publicKey.pem),
  );

  app.get('/', (_request, reply) => {
    const url = context.publicUrl();
    return reply
      .type('text/plain; charset=utf-8')
      .send(
        [
          `Millrace dispatcher ${VERSION}`,
          '',
          'Requestors',
          `  MILLRACE_URL=${url}`,
          `  ${url}/v1/jobs            submit (POST), list (GET); /{id}, /{id}/events, /{id}/explain, /{id}/cancel`,
          `  ${url}/v1/tasks/{id}      /logs: what its attempts said; /explain: why it stands where it does`,
          `  ${url}/v1/dead-tasks      what failed for good; POST /v1/jobs/{id}/redrive does it again`,
          `  ${url}/v1/nodes           who works here`,
          `  ${url}/v1/queues          how much work waits, and who could do it`,
          `  ${url}/v1/computes        code by digest (PUT, HEAD, GET /sha256/{digest}), list (GET)`,
          '',
          'Nodes',
          `  DDS_BASE_URL=${url}`,
          `  DMS_BASE_URL=${url}/v1`,
          '',
          'Operators',
          `  ${url}/health             up?`,
          `  ${url}/ready              do its store and its blobs answer?`,
          `  ${url}/metrics            for Prometheus`,
          `  ${url}/service/public-key checks the tokens made here (ES256)`,
          '',
        ].join('\n'),
      );
  });
}
