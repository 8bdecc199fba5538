/**
 * Takes stdout away from everything but the wire. What other code prints from then on appears on stderr.
 *
 * Where stdout is a pipe (under the supervisors in use) the descriptor itself is replaced, so native code, worker threads and
 * children that inherit stdout are covered as well. Node.js can duplicate no descriptor, and a socket (what Node.js gives its own
 * children) cannot be opened anew; there, the functions of Node.js by which this process and its children reach
 * descriptor 1 lead to descriptor 2.
 */
import childProcess from 'node:child_process';
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import net from 'node:net';
import { Writable } from 'node:stream';
import { RuntimeError } from './runtime-error.ts';

const STDOUT = 1;
const STDERR = 2;
/** How much may be on its way before a command that waits for its output is made to wait. */
const BUFFER_BYTES = 1024 * 1024;

/**
 * The stream to the supervisor. Call once, before any other code runs that may print.
 *
 * @throws RuntimeError when something was printed already: the supervisor has it, and takes it for frames.
 */
export function takeStdout(): Writable {
  // A stream to a file, for whoever looks at the protocol by hand, does not count.
  const { bytesWritten } = process.stdout as { readonly bytesWritten?: number };
  if (bytesWritten !== undefined && bytesWritten > 0) {
    throw new RuntimeError(
      `${bytesWritten} bytes were printed on stdout before runRuntime, which in server mode is the protocol's from the first byte on; call runRuntime before anything that prints`,
    );
  }
  const wire = openWire();
  redirectStream();
  return wire;
}

function openWire(): Writable {
  const kind = fs.fstatSync(STDOUT);
  if (kind.isFIFO() && process.platform === 'linux') {
    const fd = fs.openSync(`/proc/self/fd/${STDOUT}`, fs.constants.O_WRONLY);
    replaceDescriptor();
    return openSocket(fd);
  }
  redirectDescriptorCalls();
  if (kind.isFIFO() || kind.isSocket()) return openSocket(STDOUT);
  // A file or a terminal, when somebody looks at the protocol by hand.
  return fs.createWriteStream('', { fd: STDOUT, highWaterMark: BUFFER_BYTES });
}

function openSocket(fd: number): Writable {
  const options = { fd, readable: false, writable: true, writableHighWaterMark: BUFFER_BYTES };
  return new net.Socket(options);
}

/** The lowest free descriptor is the one that was just closed. */
function replaceDescriptor(): void {
  const append = fs.constants.O_WRONLY | fs.constants.O_APPEND;
  fs.closeSync(STDOUT);
  try {
    fs.openSync(`/proc/self/fd/${STDERR}`, append);
    if (!fs.fstatSync(STDERR).isFile()) return;
    // The new descriptor has a place of its own in the file; both must append, or they write over each other.
    fs.closeSync(STDERR);
    fs.openSync(`/proc/self/fd/${STDOUT}`, append);
  } catch {
    // stderr is a socket or closed: what reaches the bare descriptor is dropped.
    fs.openSync('/dev/null', fs.constants.O_WRONLY);
  }
}

/** `process.stdout` and `console`, also where somebody has kept the stream. Ending it, which Node.js allows, changes nothing. */
function redirectStream(): void {
  const write = process.stderr.write.bind(process.stderr);
  const kept = process.stdout;
  const instead = new Writable();
  for (const stream of [kept, instead]) {
    Object.assign(stream, {
      write,
      end: (chunk?: unknown, ...rest: unknown[]) => {
        if (typeof chunk === 'string' || chunk instanceof Uint8Array) write(chunk);
        const done = [chunk, ...rest].find((argument) => typeof argument === 'function');
        if (typeof done === 'function') process.nextTick(done);
        return stream;
      },
      destroy: () => stream,
      destroySoon: () => undefined,
    });
  }
  Object.defineProperty(instead, 'fd', { value: STDERR });
  Object.defineProperty(process, 'stdout', { configurable: true, enumerable: true, get: () => instead });
}

type AnyFunction = (...args: unknown[]) => unknown;

/** The functions that take a descriptor or hand it to a child. */
function redirectDescriptorCalls(): void {
  const files = fs as unknown as Record<string, AnyFunction>;
  for (const name of [
    'write',
    'writeSync',
    'writev',
    'writevSync',
    'writeFile',
    'writeFileSync',
    'appendFileSync',
  ]) {
    const original = files[name]!;
    files[name] = (target, ...rest) => original(target === STDOUT ? STDERR : target, ...rest);
  }
  const { spawn } = childProcess.ChildProcess.prototype as unknown as { spawn: AnyFunction };
  Object.assign(childProcess.ChildProcess.prototype, {
    spawn(this: unknown, options: { stdio?: unknown }) {
      return spawn.call(this, { ...options, stdio: redirectStdio(options.stdio) });
    },
  });
  const processes = childProcess as unknown as Record<string, AnyFunction>;
  for (const name of ['spawnSync', 'execFileSync', 'execSync']) {
    const original = processes[name]!;
    processes[name] = (...args) => original(...args.map(redirectOptions));
  }
  syncBuiltinESMExports();
}

function redirectOptions(argument: unknown): unknown {
  if (typeof argument !== 'object' || argument === null || !('stdio' in argument)) return argument;
  return { ...argument, stdio: redirectStdio(argument.stdio) };
}

function redirectStdio(stdio: unknown): unknown {
  if (stdio === 'inherit') return ['inherit', STDERR, 'inherit'];
  if (!Array.isArray(stdio)) return stdio;
  return stdio.map((entry: unknown, index) => {
    const isStdout =
      entry === STDOUT || entry === process.stdout || (entry === 'inherit' && index === STDOUT);
    return isStdout ? STDERR : entry;
  });
}
