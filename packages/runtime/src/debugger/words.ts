/**
 * Splits a line into words as a shell does: blanks separate, quotes and backslashes keep what they cover.
 *
 * @throws SyntaxError for a quote that is not closed.
 */
export function splitWords(line: string): string[] {
  const words: string[] = [];
  let word: string | null = null;
  let quote: string | null = null;
  for (let at = 0; at < line.length; at += 1) {
    const char = line[at]!;
    if (quote !== null) {
      if (char === quote) quote = null;
      else if (char === '\\' && quote === '"' && '"\\'.includes(line[at + 1] ?? ' '))
        word += line[(at += 1)]!;
      else word += char;
    } else if (char === '"' || char === "'") {
      quote = char;
      word ??= '';
    } else if (/\s/.test(char)) {
      if (word !== null) words.push(word);
      word = null;
    } else if (char === '\\' && at + 1 < line.length) word = (word ?? '') + line[(at += 1)]!;
    else word = (word ?? '') + char;
  }
  if (quote !== null) throw new SyntaxError(`a ${quote} is not closed`);
  if (word !== null) words.push(word);
  return words;
}
