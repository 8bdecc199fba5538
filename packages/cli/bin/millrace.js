#!/usr/bin/env node
// npm links commands when it installs, which in this workspace is before the first build, and it skips targets that
// do not exist. So the linked file is this one, and the program is what the build puts into dist.
import module from 'node:module';

// Compiled code is kept between starts where Node can do that (22.8 and newer); it halves the time to the first line.
module.enableCompileCache?.();

try {
  await import('../dist/main.js');
} catch (error) {
  if (error?.code !== 'ERR_MODULE_NOT_FOUND' || !String(error.message).includes('main.js')) throw error;
  process.stderr.write('millrace: not built yet; run "npm run build" in the repository first\n');
  process.exitCode = 2;
}
