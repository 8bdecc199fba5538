#!/usr/bin/env node
// The linked file is not the built one for the reasons in millrace.js. It is what supervisors start as a Golem runtime.
import module from 'node:module';

module.enableCompileCache?.();
await import('../dist/wasi-runtime/main.js');
