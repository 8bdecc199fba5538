/** Schemas that more than one kind of file needs. */
import { checkCapability, describeError } from '@millrace/runner';
import { z } from 'zod';

/** A capability by the contract's own rule. */
export const capabilitySchema = z.string().superRefine((value, context) => {
  try {
    checkCapability(value);
  } catch (error) {
    context.addIssue({ code: 'custom', message: describeError(error), input: undefined });
  }
});
