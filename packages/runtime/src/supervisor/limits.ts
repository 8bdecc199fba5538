import { MillraceError } from '@millrace/runner';
import { DEFAULT_MAX_FRAME_BYTES } from '../wire/frames.ts';

/** Every limit is on by default; a breach fails the command with an error that names limit and value. */
export interface SupervisorLimits {
  /** One deploy. Default 10 min. */
  readonly deployMs: number;
  /** From starting the runtime to its hello; in command mode, one start. Default 60 s. */
  readonly startMs: number;
  /** For the answer to a request other than hello and shutdown. Default 30 s. */
  readonly answerMs: number;
  /** One run. Default 24 h. */
  readonly runMs: number;
  /** For the answer to Shutdown. Default 5 s, the window runtimes know. */
  readonly stopMs: number;
  /** From that answer and the end of its input to its exit, before it is killed. Default 1 s. */
  readonly exitMs: number;
  /** Between SIGTERM and SIGKILL, and between the steps of ending a command. Default 5 s. */
  readonly killGraceMs: number;
  /** Output of one command, both streams, kept or not. Default 256 MiB. */
  readonly outputBytes: number;
  /** Kept of each stream of a command. Default 1 MiB. What is beyond is counted and dropped; this alone fails nothing. */
  readonly captureBytes: number;
  /** One frame. Default 16 MiB. */
  readonly maxFrameBytes: number;
}

export const DEFAULT_SUPERVISOR_LIMITS: SupervisorLimits = {
  deployMs: 10 * 60_000,
  startMs: 60_000,
  answerMs: 30_000,
  runMs: 24 * 60 * 60_000,
  stopMs: 5_000,
  exitMs: 1_000,
  killGraceMs: 5_000,
  outputBytes: 256 * 1024 * 1024,
  captureBytes: 1024 * 1024,
  maxFrameBytes: DEFAULT_MAX_FRAME_BYTES,
};

/** @throws MillraceError `invalid_argument` naming limit, rule and value. */
export function checkLimits(given: Partial<SupervisorLimits> = {}): SupervisorLimits {
  const limits = { ...DEFAULT_SUPERVISOR_LIMITS, ...given };
  for (const [name, value] of Object.entries(limits)) {
    if (!Number.isSafeInteger(value) || value < 0) {
      throw new MillraceError('invalid_argument', `limits.${name} must be a whole number >= 0, got ${value}`);
    }
  }
  return limits;
}
