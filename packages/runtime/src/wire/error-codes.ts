/** The numbers an error answer may carry; others occur in the wild. */
export const WIRE_ERROR = { internal: 0, not_found: 1, bad_request: 2 } as const;
