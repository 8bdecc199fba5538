/**
 * The node's side of DDS: nonce, registration, login. {@link Dds} is the port, `HttpDds` the real one. Errors as in
 * `dms.ts`; which call failed is in `details.call`: `nonce`, `register` or `verify`.
 */
import type { Resources } from '../resources.ts';
import type { CallOptions } from './dms.ts';

/** What the service wants signed; copied into the message verbatim. */
export interface SiweChallenge {
  readonly nonce: string;
  readonly domain: string;
  readonly uri: string;
  readonly version: string;
  readonly chainId: number;
  readonly issuedAt: string;
}

export interface RegisterWalletRequest {
  readonly message: string;
  readonly signature: string;
  readonly registration_credentials: string;
  readonly capabilities: readonly string[];
  readonly version: string;
  /** Newer services. */
  readonly max_concurrency?: number;
  /** Ours. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Ours: what the node has to give. */
  readonly resources?: Resources;
}

export interface NodeToken {
  readonly accessToken: string;
  /** Epoch milliseconds. */
  readonly expiresAtMs: number;
  /** The service's clock when it answered, epoch milliseconds, so that a wrong local clock shows. Null: not told. */
  readonly serverTimeMs?: number | null;
}

export interface Dds {
  requestNonce(wallet: string, options?: CallOptions): Promise<SiweChallenge>;
  registerWallet(request: RegisterWalletRequest, options?: CallOptions): Promise<void>;
  verify(
    request: { readonly address: string; readonly message: string; readonly signature: string },
    options?: CallOptions,
  ): Promise<NodeToken>;
}
