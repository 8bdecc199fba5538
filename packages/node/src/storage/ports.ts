/**
 * The storage ports of one task: inputs from and artifacts to the lease's domain server. See `inputs.ts`, `outputs.ts`
 * and `uploads.ts` for how.
 */
import type { Clock, Random } from '@millrace/runner';
import { openDomainStorage, type DomainStorage, type DomainStorageOptions } from '@millrace/dispatch/client';
import type { SessionStorage, StorageRequest } from '../session.ts';
import { DEFAULT_RETRY, type RetrySettings } from './attempts.ts';
import { Inputs } from './inputs.ts';
import { Outputs } from './outputs.ts';
import { DEFAULT_LIMITS, PortsWorld, type StorageLimits } from './world.ts';

export type { RetrySettings } from './attempts.ts';
export type { StorageLimits } from './world.ts';

export interface StoragePortsOptions extends StorageRequest {
  /** Sent as `posemesh-client-id`; the services charge once per client, so it should be one and the same for long. */
  readonly clientId: string;
  readonly clock: Clock;
  readonly random: Random;
  /**
   * Gives the client of a domain server; whoever gives it closes it. Default: one with connections of its own,
   * closed with the ports. A node hands in those of a `DomainPool`, which keeps connections from task to task.
   */
  readonly storage?: (options: DomainStorageOptions) => DomainStorage;
  readonly limits?: Partial<StorageLimits>;
  readonly retry?: Partial<RetrySettings>;
}

/** Opens the ports. Nothing is asked or written before they are used. */
export function openStoragePorts(options: StoragePortsOptions): SessionStorage {
  const { clock, lease, token, clientId } = options;
  const owned: AsyncDisposable[] = [];
  const world = new PortsWorld({
    ...options,
    folder: () => options.folder.create(),
    limits: { ...DEFAULT_LIMITS, ...options.limits },
    retry: { ...DEFAULT_RETRY, ...options.retry },
    openStorage: ({ serverUrl }) => {
      const settings = { baseUrl: serverUrl, token, clientId, clock };
      if (options.storage !== undefined) return options.storage(settings);
      const storage = openDomainStorage(settings);
      owned.push(storage);
      return storage;
    },
  });
  const outputs = new Outputs(world, { id: lease.task.id, outputsPrefix: lease.task.outputs_prefix });
  return {
    input: new Inputs(world),
    output: outputs,
    artifacts: () => outputs.records(),
    transferred: () => ({ bytesIn: world.bytesIn, bytesOut: world.bytesOut }),
    close: async () => {
      await world.close();
      await Promise.all(owned.splice(0).map((storage) => storage[Symbol.asyncDispose]()));
    },
  };
}
