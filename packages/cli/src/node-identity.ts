/** A node's credentials as the environment it reads. */
import { generatePrivateKeyHex, type Requestor } from '@millrace/dispatch/client';

/** The variables that make a node of this dispatcher, by name. */
export type NodeEnv = Readonly<
  Record<'DDS_BASE_URL' | 'DMS_BASE_URL' | 'REG_SECRET' | 'SECP256K1_PRIVHEX', string>
>;

export interface NodeIdentity {
  readonly id: string;
  readonly env: NodeEnv;
}

/** Makes a fresh key and credentials for it. The key never leaves this machine. */
export async function createIdentity(
  requestor: Requestor,
  url: string,
  node: { readonly name: string; readonly mode: 'public' | 'dedicated' },
): Promise<NodeIdentity> {
  const { id, registrationCredentials } = await requestor.addNode(node);
  return {
    id,
    env: {
      DDS_BASE_URL: url,
      DMS_BASE_URL: `${url}/v1`,
      REG_SECRET: registrationCredentials,
      SECP256K1_PRIVHEX: generatePrivateKeyHex(),
    },
  };
}

/** The variables as an env file, with a heading that says what it is. */
export function envFileText(name: string, env: NodeEnv): string {
  const lines = Object.entries(env).map(([key, value]) => `${key}=${value}`);
  return `# Millrace node ${JSON.stringify(name)}. Keep this private: it holds the node's key.\n${lines.join('\n')}\n`;
}
