// SPDX-License-Identifier: MIT
// Characters that nobody sees, or that turn others around: what is agreed to has to be what is read.

// Controls (but line feed and tab), zero widths, marks and overrides of direction, tags, variation selectors.
const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\u115f\u1160\u3164\uffa0\ufe00-\ufe0f\u{e0100}-\u{e01ef}]/gu;

/** The text with each of them written as an escape. */
export function escapeUnseen(text: string): string {
  return text.replace(UNSEEN, (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`);
}
