/**
 * A named pipe for what a program in a container says about its work: descriptors are not handed into containers, files are. A pipe takes no disk,
 * makes the program wait while nobody reads, and does not care whether it is opened anew for each line.
 */
import { execFile } from 'node:child_process';
import { closeSync, constants, openSync } from 'node:fs';
import { chmod } from 'node:fs/promises';
import { Socket } from 'node:net';
import { promisify } from 'node:util';
import { MillraceError } from '@millrace/runner';

export class EventsPipe {
  readonly #socket: Socket;
  /** Held open so that the pipe has no end before {@link end} says so, however often the program closes it. */
  readonly #writer: number;
  readonly #ended: Promise<void>;

  /** Makes the pipe, writable for everybody who can reach it. @throws MillraceError `failed_precondition` */
  static async open(path: string, onData: (bytes: Buffer) => void): Promise<EventsPipe> {
    try {
      await promisify(execFile)('mkfifo', [path]);
      await chmod(path, 0o666);
    } catch (error) {
      throw new MillraceError(
        'failed_precondition',
        `the pipe for events ${path} cannot be made with mkfifo`,
        { cause: error },
      );
    }
    return new EventsPipe(path, onData);
  }

  constructor(path: string, onData: (bytes: Buffer) => void) {
    const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    this.#writer = openSync(path, constants.O_WRONLY | constants.O_NONBLOCK);
    this.#socket = new Socket({ fd: reader, readable: true, writable: false });
    this.#socket.on('data', onData);
    this.#ended = new Promise((resolve) => {
      this.#socket.once('close', () => resolve());
    });
    // Ends as well; what could not be read is lost, and nothing of it was promised.
    this.#socket.on('error', () => undefined);
  }

  /** Reads what is left, once no program writes any more; or gives up when the signal aborts. */
  async end(signal: AbortSignal): Promise<void> {
    const giveUp = (): void => void this.#socket.destroy();
    closeSync(this.#writer);
    signal.addEventListener('abort', giveUp, { once: true });
    if (signal.aborted) giveUp();
    await this.#ended;
    signal.removeEventListener('abort', giveUp);
  }
}
