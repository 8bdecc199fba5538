/** Schemas that more than one kind of file needs. */
import { parseResources } from '@millrace/dispatch/client';
import { MillraceError, checkCapability, describeError } from '@millrace/runner';
import { z } from 'zod';

/** A capability by the contract's own rule. */
export const capabilitySchema = z.string().superRefine((value, context) => {
  try {
    checkCapability(value);
  } catch (error) {
    context.addIssue({ code: 'custom', message: describeError(error), input: undefined });
  }
});

/** Amounts by name; `memory` may be a size. */
export const resourcesSchema = z
  .record(z.string(), z.union([z.number(), z.string()]))
  .superRefine((value, context) => {
    try {
      parseResources(value);
    } catch (error) {
      const { message, details } = MillraceError.from(error);
      const { name } = details;
      if (typeof name === 'string') {
        context.addIssue({ code: 'custom', message, path: [name], input: value[name] });
      } else context.addIssue({ code: 'custom', message });
    }
  });
