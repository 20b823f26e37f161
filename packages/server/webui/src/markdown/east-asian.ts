// SPDX-License-Identifier: MIT
// Emphasis in Chinese, Japanese and Korean texts. CommonMark tells by the punctuation beside asterisks whether they open
// or close, which takes blanks between words. Source of the rule: the specification of markdown-cjk-friendly. CJK
// punctuation counts as a letter, and so does any punctuation across the asterisks from a CJK character.

const CJK = String.raw`[\p{sc=Han}\p{sc=Hira}\p{sc=Kana}\p{sc=Hang}\p{sc=Bopo}\u3001-\u303f\uff01-\uffee]`;
const PUNCTUATION = String.raw`(?![*_~])[\p{P}\p{S}]`;
const BESIDE = new RegExp(
  `(?=${CJK})${PUNCTUATION}(?=[*~])|${PUNCTUATION}(?=[*~]+${CJK})|(?<=[*~])(?=${CJK})${PUNCTUATION}|(?<=${CJK}[*~]+)${PUNCTUATION}`,
  "gu",
);
const OPENS = new RegExp(`^(?:${CJK}[*~]+${PUNCTUATION}|.?[*~]+(?=${CJK})${PUNCTUATION})`, "u");

/** A text in which such punctuation is a letter, of the same length. */
export const masked = (text: string): string => text.replace(BESIDE, (found) => "a".repeat(found.length));

/** Whether asterisks or tildes at the beginning of a text open although punctuation follows them. */
export const opensBeside = (source: string, previous: string): boolean => OPENS.test(previous + source.slice(0, 64));
