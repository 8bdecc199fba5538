/** How the model refuses: one prefix for rules of the model, one sentence per kind of unknown word. */
import { MillraceError } from '../errors.ts';

/** A value that has the right shape and breaks a rule. `path` names it. */
export function invalidModel(path: string, rule: string): MillraceError {
  return new MillraceError('invalid_argument', `invalid model: ${path}: ${rule}`);
}

/** A word of a text form that means nothing; the text is kept as it was given. */
export function unknownWord(what: string, text: string, known: string): MillraceError {
  return new MillraceError('invalid_argument', `unknown ${what}: ${text} (known: ${known})`);
}
