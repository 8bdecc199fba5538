/**
 * The supervisor's end of the wire: requests out, answers matched by id, events handed on.
 *
 * Every call settles: with its answer, or with an error when the answer is of the wrong kind, the deadline passes, or the
 * client is failed because the runtime is gone or writes something else than frames.
 */
import type { Readable, Writable } from 'node:stream';
import { MillraceError, truncateUtf8, type Clock, type ErrorCode, type Timer } from '@millrace/runner';
import { describeRequest, describeResponse } from '../wire/describe.ts';
import { WIRE_ERROR } from '../wire/error-codes.ts';
import { FrameDecoder, encodeFrame } from '../wire/frames.ts';
import {
  decodeRequest,
  decodeResponse,
  encodeRequest,
  type RequestInit,
  type Response,
  type ResponseCommand,
} from '../wire/messages.ts';

/** A frame that went over the wire. */
export interface TracedFrame {
  readonly direction: 'sent' | 'received';
  /** The message in one line. */
  readonly text: string;
  /** The whole frame as sent; of a received one, the payload behind its shortest length. */
  readonly bytes: Uint8Array;
}

export type StatusEvent = Extract<ResponseCommand, { case: 'status' }>['value'];
export type RuntimeStatusEvent = Extract<ResponseCommand, { case: 'rtStatus' }>['value'];

export interface WireClientOptions {
  readonly fromRuntime: Readable;
  readonly toRuntime: Writable;
  readonly clock: Clock;
  readonly maxFrameBytes: number;
  readonly onStatus: (event: StatusEvent) => void;
  readonly onRuntimeStatus: (event: RuntimeStatusEvent) => void;
  /** A frame that fits nowhere and was ignored. */
  readonly onStray: (what: string) => void;
  /** The runtime's output is no longer frames, or has ended. Nothing is read from then on. */
  readonly onBroken: (error: MillraceError) => void;
  readonly onFrame?: (frame: TracedFrame) => void;
}

type Kind = 'hello' | 'run' | 'kill' | 'network' | 'shutdown';
type CommandInit = NonNullable<RequestInit['command']>;
type CommandOf<K extends Kind> = Extract<CommandInit, { case: K }>['value'];
type AnswerOf<K extends Kind> = Extract<ResponseCommand, { case: K }>['value'];

interface Call {
  readonly kind: Kind;
  readonly timer: Timer;
  resolve(command: ResponseCommand): void;
  reject(error: unknown): void;
}

/** As the supervisors in use do. 0 is never used: answers to it are too short for some decoders. */
const FIRST_ID = 2n;

const ERROR_CODE: Readonly<Record<number, ErrorCode>> = {
  [WIRE_ERROR.not_found]: 'not_found',
  [WIRE_ERROR.bad_request]: 'invalid_argument',
};

export class WireClient {
  readonly #options: WireClientOptions;
  readonly #decoder: FrameDecoder;
  readonly #calls = new Map<bigint, Call>();
  #nextId = FIRST_ID;
  #failure: unknown = null;

  constructor(options: WireClientOptions) {
    this.#options = options;
    this.#decoder = new FrameDecoder(options.maxFrameBytes);
    this.#read();
    // A runtime that is gone is noticed by its exit; until then calls wait for their deadline.
    options.toRuntime.on('error', () => undefined);
  }

  /**
   * Sends a request and waits for its answer. May be called concurrently.
   *
   * @throws MillraceError what the runtime answered (`not_found`, `invalid_argument`, else `failed_precondition`),
   * `deadline_exceeded` after `timeoutMs`, `data_loss` for an answer of the wrong kind, or what {@link fail} was given.
   */
  async call<K extends Kind>(kind: K, value: CommandOf<K>, timeoutMs: number): Promise<AnswerOf<K>> {
    if (this.#failure !== null) throw this.#failure;
    const id = this.#nextId;
    this.#nextId += 1n;
    const payload = encodeRequest({ id, command: { case: kind, value } as CommandInit });
    const answered = new Promise<ResponseCommand>((resolve, reject) => {
      const timer = this.#options.clock.setTimer(() => {
        this.#calls.delete(id);
        reject(this.#noAnswer(kind, timeoutMs));
      }, timeoutMs);
      this.#calls.set(id, { kind, timer, resolve, reject });
    });
    const frame = encodeFrame(payload);
    this.#options.onFrame?.({
      direction: 'sent',
      text: describeRequest(decodeRequest(payload)),
      bytes: frame,
    });
    this.#options.toRuntime.write(frame);
    const answer = await answered;
    if (answer.case === kind) return answer.value as AnswerOf<K>;
    if (answer.case === 'error') {
      const { code, message, context } = answer.value;
      throw new MillraceError(
        ERROR_CODE[code] ?? 'failed_precondition',
        `the runtime refused ${kind}: ${truncateUtf8(message, 2000)} (code ${code})`,
        { details: { runtimeCode: code, context: { ...context } } },
      );
    }
    throw new MillraceError('data_loss', `the runtime answered ${kind} with ${answer.case ?? 'nothing'}`);
  }

  /** Rejects all pending and future calls. The first error stays. */
  fail(error: unknown): void {
    this.#failure ??= error;
    for (const call of this.#calls.values()) {
      call.timer.cancel();
      call.reject(this.#failure);
    }
    this.#calls.clear();
  }

  /** Text on the wire usually reads as the start of a frame that never ends. */
  #noAnswer(kind: Kind, timeoutMs: number): MillraceError {
    const late = `the runtime did not answer ${kind} within ${timeoutMs} ms`;
    if (!this.#decoder.midFrame) return new MillraceError('deadline_exceeded', late);
    return new MillraceError(
      'data_loss',
      `${late}; its stdout stopped in the middle of a frame, so it does not speak the protocol there (does it print text?)`,
    );
  }

  #read(): void {
    const { fromRuntime, onBroken } = this.#options;
    const decoder = this.#decoder;
    const broken = (error: unknown): void => {
      fromRuntime.removeAllListeners('data');
      // Read on to nowhere: a runtime that waits for its output to be taken would not see its input end.
      fromRuntime.resume();
      onBroken(
        new MillraceError(
          'data_loss',
          `the runtime does not speak the protocol on its stdout: ${(error as Error).message}`,
          {
            cause: error,
          },
        ),
      );
    };
    fromRuntime.on('data', (chunk: Uint8Array) => {
      try {
        decoder.push(chunk, (payload) => this.#onPayload(payload));
      } catch (error) {
        broken(error);
      }
    });
    fromRuntime.once('error', broken);
    fromRuntime.once('end', () => {
      try {
        decoder.end();
        onBroken(new MillraceError('unavailable', 'the runtime closed its stdout'));
      } catch (error) {
        broken(error);
      }
    });
  }

  #onPayload(payload: Uint8Array): void {
    const response = decodeResponse(payload);
    this.#options.onFrame?.({
      direction: 'received',
      text: describeResponse(response),
      bytes: encodeFrame(payload),
    });
    if (response.event) this.#onEvent(response);
    else this.#onAnswer(response);
  }

  #onEvent({ command }: Response): void {
    if (command.case === 'status') this.#options.onStatus(command.value);
    else if (command.case === 'rtStatus') this.#options.onRuntimeStatus(command.value);
    else this.#options.onStray(`an event that is ${command.case ?? 'empty'}`);
  }

  #onAnswer({ id, command }: Response): void {
    const call = this.#calls.get(id);
    if (!call) {
      this.#options.onStray(`an answer to request ${id}, which is not open`);
      return;
    }
    this.#calls.delete(id);
    call.timer.cancel();
    call.resolve(command);
  }
}
