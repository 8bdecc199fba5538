import { describe, expect, test } from 'vitest';
import { parseCid } from './cid.ts';

const D = '9c0c1111-2222-4333-8444-555566667777';
const ID = '2f9f1111-2222-4333-8444-555566667777';
const OTHER = '00000000-2222-4333-8444-555566667777';
const domain = { id: D, serverUrl: 'https://domain.example:8443/base/' };
const at = `https://domain.example:8443`;

describe('a CID', () => {
  test.each([
    [`  ${ID}\n`, { domainId: D, ids: [ID] }],
    ['any-text', { domainId: D, ids: ['any-text'] }],
    [`${at}/api/v1/domains/${D}/data/${ID}`, { domainId: D, ids: [ID] }],
    [`${at}/base/api/v1/domains/${D.toUpperCase()}/data/${ID}?ids=${OTHER}`, { domainId: D, ids: [ID] }],
    [`/api/v1/domains/${D}/data?ids=${ID},${OTHER}&ids=x`, { domainId: D, ids: [ID, OTHER, 'x'] }],
    [
      `/api/v1/domains/${D}/data/${ID}?name=n&name=m&data_type=t`,
      { domainId: D, ids: [ID], name: 'n', dataType: 't' },
    ],
    [`/api/v1/domains/${D}/data?name=n`, { domainId: D, ids: [], name: 'n' }],
    [`/anything?ids=${ID}`, { domainId: D, ids: [ID] }],
    [`https://DOMAIN.example:8443/domains/${D}/data/${ID}`, { domainId: D, ids: [ID] }],
  ])('%j asks for %j', (cid, query) => {
    expect(parseCid(cid, domain)).toEqual(query);
  });

  test.each([
    ['', 'invalid_argument'],
    ['  ', 'invalid_argument'],
    ['http://', 'invalid_argument'],
    [`/api/v1/domains/${D}/data`, 'invalid_argument'],
    [`/api/v1/domains/${D}/data?ids=,&data_type=t`, 'invalid_argument'],
    [`/api/v1/domains/${OTHER}/data/${ID}`, 'permission_denied'],
    [`https://evil.example/api/v1/domains/${D}/data/${ID}`, 'permission_denied'],
    [`https://domain.example/api/v1/domains/${D}/data/${ID}`, 'permission_denied'],
    [`http://domain.example:8443/api/v1/domains/${D}/data/${ID}`, 'permission_denied'],
    [`//evil.example/api/v1/domains/${D}/data/${ID}`, 'permission_denied'],
    ['ipfs://bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi', 'permission_denied'],
    ['file:///etc/passwd', 'permission_denied'],
  ])('%j is refused: %s', (cid, code) => {
    expect(() => parseCid(cid, domain)).toThrow(expect.objectContaining({ code }));
  });
});
