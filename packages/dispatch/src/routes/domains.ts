/** Ours: the domains that share this dispatcher, and how many turns each of them gets. */
import { MillraceError } from '@millrace/runner';
import type { FastifyInstance } from 'fastify';
import { MAX_WEIGHT } from '../records.ts';
import { requireUuid, type ServerContext } from './context.ts';

const WEIGHT_SCHEMA = {
  type: 'object',
  required: ['weight'],
  properties: { weight: { type: 'integer', minimum: 1, maximum: MAX_WEIGHT } },
};

export function registerDomainsRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store } = context;

  app.get('/api/v1/domains', async (request) => {
    const claims = await auth.client(request, 'read');
    const domains = await store.domains();
    const { domainId } = claims;
    return {
      domains: domainId === null ? domains : domains.filter(({ domain_id }) => domain_id === domainId),
    };
  });

  app.put<{ Params: { domainId: string }; Body: { weight: number } }>(
    '/api/v1/domains/:domainId',
    { schema: { body: WEIGHT_SCHEMA } },
    async (request) => {
      const claims = await auth.client(request, 'write');
      if (claims.domainId !== null) {
        // Who may use one domain may not take turns from the others.
        throw new MillraceError(
          'permission_denied',
          `weights are given with a token for every domain; this one is for domain ${claims.domainId}`,
        );
      }
      const domainId = requireUuid(request.params.domainId, 'the domain id');
      const { weight } = request.body;
      await store.setWeight(domainId, weight);
      context.log.info('domain weighted', { domain_id: domainId, weight });
      return { domain_id: domainId, weight };
    },
  );
}
