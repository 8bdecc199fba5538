import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { ENGINE_VERSION, registrationVersion } from './version.ts';

function registered(configured: string | null): { version: string; warnings: unknown[] } {
  const warnings: unknown[] = [];
  const version = registrationVersion(configured, (_message, fields) => warnings.push(fields));
  return { version, warnings };
}

describe('registrationVersion', () => {
  test("the engine's version is the package's", () => {
    const manifest = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
      version: string;
    };
    expect(ENGINE_VERSION).toBe(manifest.version);
  });

  test.each(['1.2.3', '0.0.0', '1.2.3-rc.1', '1.2.3-0a.-.x-y', '1.2.3+001', '10.20.30-a.1+b.c'])(
    '%s is used as it is',
    (version) => {
      expect(registered(version)).toEqual({ version, warnings: [] });
      expect(registered(`  ${version}\n`)).toEqual({ version, warnings: [] });
    },
  );

  test.each([null, '', '  '])('%j stands for the engine, without a warning', (configured) => {
    expect(registered(configured)).toEqual({ version: ENGINE_VERSION, warnings: [] });
  });

  test.each(['v1.2.3', 'V1.2.3-rc.1'])('%s loses its v, with a warning', (configured) => {
    const used = configured.slice(1);
    expect(registered(configured)).toEqual({ version: used, warnings: [{ configured, used }] });
  });

  test.each(['dev', '1.2', '1.2.3.4', '01.2.3', '1.2.3-01', '1.2.3-', 'vv1.2.3', 'v', '1.2.3 4', '1.2.3-ä'])(
    '%s is replaced by the engine version, with a warning',
    (configured) => {
      expect(registered(configured)).toEqual({
        version: ENGINE_VERSION,
        warnings: [{ configured, used: ENGINE_VERSION }],
      });
    },
  );
});
