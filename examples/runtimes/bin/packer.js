#!/usr/bin/env node
import '../dist/packer.js';
