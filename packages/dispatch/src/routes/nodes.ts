/** Nodes as the requestor's side sees them: making credentials, listing, who is busy with what, and how much waits. */
import { randomBytes } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import type { FastifyInstance } from 'fastify';
import { queueReport } from '../queue-report.ts';
import type { NodeMode } from '../records.ts';
import type { ServerContext } from './context.ts';
import { hashSecret } from './dds.ts';

const NODE_SCHEMA = {
  type: 'object',
  required: ['name'],
  properties: {
    name: { type: 'string', minLength: 1, maxLength: 128 },
    mode: { enum: ['public', 'dedicated'] },
  },
};

export function registerNodeRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store } = context;

  app.post<{ Body: { name: string; mode?: NodeMode } }>(
    '/api/v1/nodes',
    { schema: { body: NODE_SCHEMA } },
    async (request, reply) => {
      const claims = await auth.client(request, 'write');
      if (claims.domainId !== null) {
        // A node serves every domain of its organization, so whoever may use one domain may not add it.
        throw new MillraceError(
          'permission_denied',
          `adding nodes needs a token for every domain; this one is for domain ${claims.domainId}`,
        );
      }
      const secret = randomBytes(32).toString('base64url');
      const node = await store.createNode({
        name: request.body.name,
        mode: request.body.mode ?? 'public',
        organizationId: context.organizationId,
        secretHash: hashSecret(secret),
      });
      context.log.info('node added', { node_id: node.id, name: node.name, mode: node.mode });
      return reply.code(201).send({
        id: node.id,
        name: node.name,
        mode: node.mode,
        organization_id: node.organization_id,
        registration_secret: secret,
        registration_credentials: Buffer.from(`${node.id}:${secret}`).toString('base64'),
      });
    },
  );

  app.get('/v1/nodes', async (request) => {
    await auth.client(request, 'read');
    return { nodes: await store.listNodes() };
  });

  app.get('/v1/queues', async (request) => {
    await auth.client(request, 'read');
    const [queues, nodes] = await Promise.all([store.queues(), store.listNodes()]);
    return queueReport(queues, nodes, context.clock.now());
  });

  app.get<{ Querystring: { mode?: string } }>('/v1/nodes/busy', async (request) => {
    await auth.client(request, 'read');
    const { mode = 'all' } = request.query;
    if (mode !== 'all' && mode !== 'public' && mode !== 'dedicated') {
      throw new MillraceError(
        'invalid_argument',
        `mode must be all, public or dedicated, got ${JSON.stringify(mode)}`,
      );
    }
    return { nodes: await store.busyNodes(mode) };
  });
}
