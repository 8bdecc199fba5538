/**
 * The messages as values: one place turns bytes into them and back. Process ids and request ids are unsigned 64-bit and
 * therefore bigint.
 */
import { create, fromBinary, toBinary, type MessageInitShape } from '@bufbuild/protobuf';
import { MillraceError } from '@millrace/runner';
import { encodeFrame } from './frames.ts';
import {
  RequestSchema,
  ResponseSchema,
  type Request,
  type Response,
} from './gen/ya_runtime_api/runtime_pb.ts';

export type { Request, Response };
export type RequestCommand = Request['command'];
export type ResponseCommand = Response['command'];
export type RequestInit = MessageInitShape<typeof RequestSchema>;
export type ResponseInit = MessageInitShape<typeof ResponseSchema>;

/** The payload of a request. */
export function encodeRequest(request: RequestInit): Uint8Array {
  return toBinary(RequestSchema, create(RequestSchema, request));
}

/** The payload of an answer or an event. */
export function encodeResponse(response: ResponseInit): Uint8Array {
  return toBinary(ResponseSchema, create(ResponseSchema, response));
}

/** A request as it goes over the wire. */
export function requestFrame(request: RequestInit): Uint8Array {
  return encodeFrame(encodeRequest(request));
}

/** An answer or event as it goes over the wire. */
export function responseFrame(response: ResponseInit): Uint8Array {
  return encodeFrame(encodeResponse(response));
}

/** @throws MillraceError `invalid_argument` for bytes that are no request. */
export function decodeRequest(payload: Uint8Array): Request {
  return decoded('a request', payload, () =>
    fromBinary(RequestSchema, payload, { readUnknownFields: false }),
  );
}

/** @throws MillraceError `invalid_argument` for bytes that are neither answer nor event. */
export function decodeResponse(payload: Uint8Array): Response {
  return decoded('a response', payload, () =>
    fromBinary(ResponseSchema, payload, { readUnknownFields: false }),
  );
}

function decoded<T>(what: string, payload: Uint8Array, read: () => T): T {
  try {
    return read();
  } catch (error) {
    const start = Buffer.from(payload.subarray(0, 32));
    const more = payload.length > 32 ? '…' : '';
    // What is not the protocol is most often something that was printed.
    const [text] = /^[\t\n\r\x20-\x7e]{4,}/.exec(start.toString('latin1')) ?? [];
    const asText = text === undefined ? '' : `, in text ${JSON.stringify(text)}`;
    throw new MillraceError(
      'invalid_argument',
      `${payload.length} bytes (${start.toString('hex')}${more}${asText}) are not ${what}`,
      { cause: error },
    );
  }
}
