// SPDX-License-Identifier: MIT
// The part of TeX's maths that models write -> MathML as a tree. What is not known makes the whole formula plain text.

import { fixed, inVariant, type MathNode, node, restyled, sign, wrapped } from "./maths-nodes.ts";
import { Scanner, Unknown } from "./maths-scanner.ts";
import {
  ACCENTS, ALPHABETS, BRACKETS, ENVIRONMENTS, FUNCTIONS, IGNORED, INTEGRALS, LARGE, LETTERS, OPERATORS, SPACES, UNDER,
} from "./maths-symbols.ts";

const MAX_LENGTH = 20_000;
const MAX_DEPTH = 60;

/** The formula as a tree; undefined where it holds something that is not known here. */
export function readMaths(source: string): MathNode | undefined {
  if (source.length > MAX_LENGTH) return undefined;
  try {
    const reader = new Reader(source);
    const lines = reader.rows(() => false);
    if (!reader.isAtEnd) return undefined;
    const isSplit = lines.some(({ children }) => children.length > 1);
    return isSplit || lines.length > 1 ? node("mtable", lines, { class: isSplit ? "align-sides" : "align-center" }) : onlyCell(lines[0]!);
  } catch (error) {
    if (error instanceof Unknown) return undefined;
    throw error;
  }
}

const onlyCell = (line: MathNode): MathNode => (line.children[0] as MathNode).children[0] as MathNode;

class Reader extends Scanner {
  private depth = 0;

  row(ends: () => boolean): MathNode {
    if (++this.depth > MAX_DEPTH) throw new Unknown();
    const items: MathNode[] = [];
    while (!this.isAtEnd && !ends()) {
      const base = this.atom();
      const item = this.scripts(base);
      if (item) items.push(item);
    }
    this.depth--;
    return wrapped(items);
  }

  private scripts(base: MathNode | undefined): MathNode | undefined {
    let [below, above]: (MathNode | undefined)[] = [];
    for (;;) {
      this.skipSpace();
      const mark = this.source[this.at];
      if (mark === "_" && !below) {
        this.at++;
        below = this.argument();
      } else if (mark === "^" && !above) {
        this.at++;
        above = this.argument();
      } else if (mark === "'" && !above) {
        const primes = /^'+/.exec(this.source.slice(this.at))![0];
        this.at += primes.length;
        above = sign("′".repeat(primes.length));
        if (this.source[this.at] === "^") {
          this.at++;
          above = node("mrow", [above, this.argument()]);
        }
      } else break;
    }
    if (this.source[this.at] === "^" || this.source[this.at] === "_") throw new Unknown(); // two of the same
    if (!below && !above) return base;
    const first = base ?? node("mrow", []);
    const limits = first.attributes?.movablelimits === "true";
    if (below && above) return node(limits ? "munderover" : "msubsup", [first, below, above]);
    if (below) return node(limits ? "munder" : "msub", [first, below]);
    return node(limits ? "mover" : "msup", [first, above!]);
  }

  /** One argument: a group in braces, a command, or one character. */
  private argument(): MathNode {
    if (this.isAtEnd) throw new Unknown();
    if (++this.depth > MAX_DEPTH) throw new Unknown();
    const digit = /^\d/.exec(this.source.slice(this.at));
    const read = digit ? node("mn", [this.take(1)]) : this.atom();
    this.depth--;
    return read ?? node("mrow", []);
  }

  private atom(): MathNode | undefined {
    const rest = this.source.slice(this.at, this.at + 80);
    const digits = /^(?:\d+(?:[.,]\d+)*|\.\d+)/.exec(rest);
    if (digits) return node("mn", [this.take(digits[0].length)]);
    const mark = this.source[this.at]!;
    if (mark === "\\") return this.command();
    if (mark === "{") return this.group();
    if (mark === "_" || mark === "^" || mark === "'") return undefined; // scripts of nothing
    if ("}&#%$".includes(mark)) throw new Unknown();
    if (mark === "~") {
      this.at++;
      return node("mspace", [], { width: "0.25em" });
    }
    const character = String.fromCodePoint(this.source.codePointAt(this.at)!);
    this.at += character.length;
    if (/\p{L}/u.test(character)) return node("mi", [character]);
    if ("()[]|/".includes(character)) return fixed(character);
    return sign(character === "-" ? "−" : character === "*" ? "∗" : character);
  }

  private group(): MathNode {
    this.at++;
    const content = this.row(() => this.source[this.at] === "}");
    this.expect("}");
    return content;
  }

  private command(): MathNode | undefined {
    const found = /^\\(?:([A-Za-z]+)\*?|([\s\S]))/.exec(this.source.slice(this.at, this.at + 80));
    if (!found) throw new Unknown();
    this.at += found[0].length;
    const name = found[1] ?? found[2]!;
    return found[1] ? this.word(name) : this.markCommand(name);
  }

  private markCommand(name: string): MathNode {
    if (Object.hasOwn(SPACES, name)) return node("mspace", [], { width: SPACES[name]! });
    if ("{}".includes(name)) return fixed(name);
    if (name === "|") return fixed("‖");
    if ("$%&#_".includes(name)) return node("mi", [name], { mathvariant: "normal" });
    throw new Unknown();
  }

  private word(name: string): MathNode | undefined {
    const look = (table: Readonly<Record<string, string>>) => (Object.hasOwn(table, name) ? table[name] : undefined);
    const letter = look(LETTERS);
    if (letter) return node("mi", [letter], /[Α-Ω∞∅…⋯⋮⋱]/u.test(letter) ? { mathvariant: "normal" } : undefined);
    const operator = look(OPERATORS);
    if (operator) return sign(operator);
    const large = look(LARGE);
    if (large) return sign(large, { movablelimits: "true" });
    const integral = look(INTEGRALS);
    if (integral) return sign(integral);
    const bracket = look(BRACKETS);
    if (bracket) return fixed(bracket);
    if (FUNCTIONS.has(name)) {
      const limits = FUNCTIONS.get(name) === true;
      const word = name.replace(/^(lim)(inf|sup)$/, "$1\u2009$2");
      return limits ? sign(word, { movablelimits: "true", form: "prefix" }) : node("mi", [word]);
    }
    const space = look(SPACES);
    if (space) return node("mspace", [], { width: space });
    const accent = look(ACCENTS);
    if (accent) return node("mover", [this.argument(), sign(accent, { stretchy: String(/^(?:wide|over)/.test(name)) })], { accent: "true" });
    const under = look(UNDER);
    if (under) return node("munder", [this.argument(), sign(under, { stretchy: "true" })], { accentunder: "true" });
    if (Object.hasOwn(ALPHABETS, name)) return restyled(this.argument(), name);
    if (IGNORED.has(name)) return undefined;
    return this.construct(name);
  }

  private construct(name: string): MathNode | undefined {
    switch (name) {
      case "frac":
      case "dfrac":
      case "tfrac":
      case "cfrac":
        return node("mfrac", [this.argument(), this.argument()]);
      case "binom":
      case "dbinom":
      case "tbinom": {
        const inner = node("mfrac", [this.argument(), this.argument()], { linethickness: "0" });
        return node("mrow", [sign("("), inner, sign(")")]);
      }
      case "sqrt": {
        const index = this.optional();
        return index ? node("mroot", [this.argument(), index]) : node("msqrt", [this.argument()]);
      }
      case "text":
      case "textrm":
      case "textit":
      case "textbf":
      case "texttt":
      case "mbox":
        return node("mtext", [this.raw()]);
      case "mathrm":
      case "operatorname":
      case "mathit": {
        const [start, variant] = [this.at, name === "mathit" ? "italic" : "normal"];
        const word = this.raw();
        if (!/[\\{}^_]/.test(word)) return node("mi", [word], { mathvariant: variant });
        this.at = start;
        return inVariant(this.argument(), variant);
      }
      case "mathop":
      case "mathbin":
      case "mathrel":
      case "mathord":
        return this.argument();
      case "textcolor":
        this.raw();
        return this.argument();
      case "xrightarrow":
      case "xleftarrow": {
        const below = this.optional();
        const [arrow, above] = [sign(name === "xrightarrow" ? "→" : "←", { stretchy: "true" }), this.argument()];
        return below ? node("munderover", [arrow, below, above]) : node("mover", [arrow, above]);
      }
      case "left":
        return this.fence();
      case "middle":
        return sign(this.delimiter(), { stretchy: "true" });
      case "begin":
        return this.environment();
      case "overset":
      case "stackrel": {
        const above = this.argument();
        return node("mover", [this.argument(), above]);
      }
      case "underset": {
        const below = this.argument();
        return node("munder", [this.argument(), below]);
      }
      case "substack":
        return this.substack();
      case "pmod":
        return node("mrow", [fixed("("), node("mi", ["mod"]), node("mspace", [], { width: "0.3em" }), this.argument(), fixed(")")]);
      case "bmod":
      case "mod":
        return sign("mod");
      case "not": {
        const negated = this.argument();
        const text = negated.children[0];
        if (typeof text !== "string") throw new Unknown();
        return sign(text + "\u0338");
      }
      case "boxed":
        return node("mrow", [this.argument()], { class: "boxed" });
      case "phantom":
        return node("mphantom", [this.argument()]);
      case "tag":
        return node("mtext", [`\u2003(${this.raw()})`]);
      case "label":
        this.raw();
        return undefined;
      default:
        throw new Unknown();
    }
  }

  private fence(): MathNode {
    const opening = this.delimiter();
    const inner = this.row(() => this.source.startsWith("\\right", this.at) && !/[A-Za-z]/.test(this.source[this.at + 6] ?? ""));
    this.expect("\\right");
    const closing = this.delimiter();
    const bracket = (text: string, form: string) => (text ? [sign(text, { stretchy: "true", fence: "true", form })] : []);
    return node("mrow", [...bracket(opening, "prefix"), inner, ...bracket(closing, "postfix")]);
  }

  private delimiter(): string {
    this.skipSpace();
    const found = /^(?:\\([A-Za-z]+)|\\([{}|])|([()[\]|/.<>]))/.exec(this.source.slice(this.at, this.at + 20));
    if (!found) throw new Unknown();
    this.at += found[0].length;
    if (found[1]) {
      const text = BRACKETS[found[1]] ?? OPERATORS[found[1]];
      if (!text) throw new Unknown();
      return text;
    }
    if (found[2]) return found[2] === "|" ? "‖" : found[2];
    return found[3] === "." ? "" : found[3] === "<" ? "⟨" : found[3] === ">" ? "⟩" : found[3]!;
  }

  private environment(): MathNode {
    const name = this.raw();
    const kind = Object.hasOwn(ENVIRONMENTS, name) ? ENVIRONMENTS[name]! : undefined;
    if (!kind) throw new Unknown();
    if (name === "array" || name === "alignedat") this.raw();
    const rows = this.rows(() => this.source.startsWith("\\end", this.at));
    this.expect("\\end");
    if (this.raw() !== name) throw new Unknown();
    const [opening, closing, align] = kind;
    const table = node("mtable", rows, { class: `align-${align}` });
    if (!opening) return table;
    const bracket = (text: string) => (text ? [sign(text, { stretchy: "true", fence: "true" })] : []);
    return node("mrow", [...bracket(opening), table, ...bracket(closing)]);
  }

  private substack(): MathNode {
    this.skipSpace();
    this.expect("{");
    const rows = this.rows(() => this.source[this.at] === "}");
    this.expect("}");
    return node("mtable", rows);
  }

  rows(ends: () => boolean): MathNode[] {
    const rows: MathNode[] = [];
    let cells: MathNode[] = [];
    const breaks = () => this.source.startsWith("\\\\", this.at) || this.source[this.at] === "&" || ends();
    for (;;) {
      cells.push(node("mtd", [this.row(breaks)]));
      if (this.source[this.at] === "&") this.at++;
      else {
        rows.push(node("mtr", cells));
        cells = [];
        if (!this.source.startsWith("\\\\", this.at)) break;
        this.at += 2;
        this.optional();
        if (this.isAtEnd || ends()) break;
      }
    }
    return rows;
  }

  private optional(): MathNode | undefined {
    this.skipSpace();
    if (this.source[this.at] !== "[") return undefined;
    this.at++;
    const content = this.row(() => this.source[this.at] === "]");
    this.expect("]");
    return content;
  }
}
