/** What is asked of a command and what comes of it, in either mode. */
import { CAPTURE_NOTHING, OutputCapture, type CaptureMode, type Captured } from './capture.ts';

export interface CommandOptions {
  /** Ends the command, and rejects with the signal's reason once it is gone. */
  readonly signal?: AbortSignal;
  /** What to keep. Default: of `deploy` and `start` everything, of a run nothing. */
  readonly capture?: { readonly stdout: CaptureMode; readonly stderr: CaptureMode };
  /** Every chunk as it comes. Not to be kept: it may share memory. */
  readonly onOutput?: (stream: 'stdout' | 'stderr', chunk: Uint8Array) => void;
}

export interface CommandResult {
  /** -1 after a signal. */
  readonly exitCode: number;
  readonly stdout: Captured;
  readonly stderr: Captured;
}

/** A command that runs. */
export interface RunningCommand {
  /** The runtime's id for it; null in command mode. */
  readonly pid: bigint | null;
  /** Rejects when the runtime dies or breaks a rule, a limit is reached, or the signal aborted. */
  readonly result: Promise<CommandResult>;
  /** Sends a signal by number. Resolves when the runtime has taken it. @throws MillraceError when it refuses. */
  kill(signal: number): Promise<void>;
}

export interface Captures {
  readonly stdout: OutputCapture;
  readonly stderr: OutputCapture;
}

export function openCaptures(capture: CommandOptions['capture'], limitBytes: number): Captures {
  return {
    stdout: new OutputCapture(capture?.stdout ?? CAPTURE_NOTHING, limitBytes),
    stderr: new OutputCapture(capture?.stderr ?? CAPTURE_NOTHING, limitBytes),
  };
}
