#!/usr/bin/env node
import '../dist/text-tools.js';
