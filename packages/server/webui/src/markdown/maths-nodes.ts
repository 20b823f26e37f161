// SPDX-License-Identifier: MIT
// MathML as a tree: its nodes, and the few kinds of them that are made often.

import { ALPHABETS } from "./maths-symbols.ts";

export interface MathNode {
  tag: string;
  attributes?: Readonly<Record<string, string>>;
  children: (MathNode | string)[];
}

export const node = (tag: string, children: (MathNode | string)[], attributes?: Record<string, string>): MathNode =>
  attributes ? { tag, children, attributes } : { tag, children };
export const sign = (text: string, attributes?: Record<string, string>) => node("mo", [text], attributes);
export const fixed = (text: string) => sign(text, { stretchy: "false" });
export const wrapped = (items: MathNode[]): MathNode => (items.length === 1 ? items[0]! : node("mrow", items));

/** Letters that are all upright, or all slanted. */
export function inVariant(given: MathNode, mathvariant: string): MathNode {
  const children = given.children.map((child) => (typeof child === "string" ? child : inVariant(child, mathvariant)));
  return given.tag === "mi" ? { ...given, children, attributes: { ...given.attributes, mathvariant } } : { ...given, children };
}

/** Letters and digits of another alphabet. */
export function restyled(given: MathNode, name: string): MathNode {
  const { upper, lower, digit, holes = "" } = ALPHABETS[name]!;
  const shift = (character: string): string => {
    const hole = [...holes].indexOf(character);
    if (hole >= 0 && hole % 2 === 0) return [...holes][hole + 1]!;
    const from = (base: number | undefined, first: string) =>
      base === undefined ? character : String.fromCodePoint(base + character.codePointAt(0)! - first.codePointAt(0)!);
    if (/[A-Z]/.test(character)) return from(upper, "A");
    if (/[a-z]/.test(character)) return from(lower, "a");
    if (/[0-9]/.test(character)) return from(digit, "0");
    return character;
  };
  const children = given.children.map((child) =>
    typeof child === "string" ? [...child].map(shift).join("") : restyled(child, name),
  );
  return { ...given, children };
}
