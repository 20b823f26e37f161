// SPDX-License-Identifier: MIT
// Markdown that grows -> blocks, of which only the last one is read again.

import { Marked, type Token, Tokenizer, type TokenizerAndRendererExtension, type Tokens } from "marked";
import { masked, opensBeside } from "./east-asian.ts";

export interface MathToken extends Tokens.Generic {
  type: "math";
  text: string;
  display: boolean;
}

export type Block = Token | MathToken;

/** A list that is still growing is shown in parts, so that only its end is read again. */
export type ListPart = Tokens.List & { part?: true };

const MAX_ITEMS = 48; // of a growing list that are read again each time
const KEPT_ITEMS = 4; // at its end, which may still change

const blockMath: TokenizerAndRendererExtension = {
  name: "math",
  level: "block",
  start: (source) => {
    const found = /\n {0,3}(?:\$\$|\\\[)/.exec(source);
    return found ? found.index + 1 : undefined;
  },
  tokenizer(source) {
    const found = /^ {0,3}(?:\$\$([^$]+?)\$\$|\\\[([\s\S]{1,4000}?)\\\])[ \t]*(?:\n|$)/.exec(source);
    return found ? { type: "math", raw: found[0], text: (found[1] ?? found[2])!.trim(), display: true } : undefined;
  },
};

// A dollar sign that opens has no space after it, one that closes has none before it and no digit after it.
const inlineMath: TokenizerAndRendererExtension = {
  name: "inlineMath",
  level: "inline",
  start: (source) => /\$|\\[([]/.exec(source)?.index,
  tokenizer(source) {
    const found =
      /^\\\(([\s\S]{1,4000}?)\\\)/.exec(source) ??
      /^\$(?![\s$])((?:\\[\s\S]|[^\\$\n])+?)(?<!\s)\$(?![\d$])/.exec(source);
    if (found) return { type: "math", raw: found[0], text: found[1]!, display: false };
    const display = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]{1,4000}?)\\\])/.exec(source);
    return display ? { type: "math", raw: display[0], text: (display[1] ?? display[2])!.trim(), display: true } : undefined;
  },
};

const MARKS = /[*_$<[!\\`~]/g;
const MAX_MARKS = 1500; // in one paragraph; the time for them grows with their square

// First of all inline rules, asked at the beginning of a paragraph: one that is full of marks stays as it is.
const dense: TokenizerAndRendererExtension = {
  name: "dense",
  level: "inline",
  tokenizer(source, tokens) {
    const isDense = !tokens.length && (source.match(MARKS)?.length ?? 0) > MAX_MARKS;
    return isDense ? { type: "escape", raw: source, text: source } : undefined;
  },
};

// Ends an address in a text without blanks, as in Chinese or Japanese, or in quotation marks.
const BEHIND_ADDRESS = /[\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65“”‘’„»›…]/;

// HTML is text like any other: its tokenizers find nothing, so that what stands in it is read as Markdown.
const marked = new Marked({
  gfm: true,
  extensions: [blockMath, inlineMath, dense],
  hooks: { emStrongMask: masked },
  tokenizer: {
    emStrong(source, mask, previous = "") {
      return Tokenizer.prototype.emStrong.call(this, source, mask, opensBeside(source, previous) ? "" : previous);
    },
    del(source, mask, previous = "") {
      if (!source.startsWith("~~")) return undefined; // 1~2 and 3~4 are ranges
      return Tokenizer.prototype.del.call(this, source, mask, opensBeside(source, previous) ? "" : previous);
    },
    url(source) {
      const found = Tokenizer.prototype.url.call(this, source);
      const end = found?.raw.search(BEHIND_ADDRESS) ?? -1;
      return end < 0 ? found : Tokenizer.prototype.url.call(this, source.slice(0, end));
    },
    html: () => undefined,
    tag: (source) => {
      const found = /^<br\s*\/?>\n?/i.exec(source);
      return found ? ({ type: "br", raw: found[0] } as unknown as Tokens.Tag) : undefined;
    },
  },
});

export const MAX_MARKDOWN = 1_000_000; // characters; what is longer is shown as plain text

/** All blocks of a whole text. */
export function readBlocks(source: string): Block[] {
  return marked.lexer(source).filter((token) => token.type !== "space" && token.type !== "def");
}

// Containers inside each other cost time without end; nobody reads past a few.
const TOO_DEEP = /^[ \t]*(?:(?:>|(?:[-*+]|\d{1,9}[.)])[ \t])[ \t]*){24}/m;

/** Whether a text would take longer to read than it is worth. */
export const isTooMuch = (source: string): boolean => source.length > MAX_MARKDOWN || TOO_DEEP.test(source);

const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m;

/** Blocks of a text that only grows: those before the last one stay the same objects. */
export class GrowingBlocks {
  private frozen: Block[] = [];
  private offset = 0; // of the first character that is not in a frozen block
  private source = "";
  private closed = false;
  private nextItem: number | undefined; // the number that a list goes on with whose beginning is frozen

  /** The blocks of `source`; with `closed` nothing more follows. */
  update(source: string, closed: boolean): readonly Block[] {
    if (source === this.source && closed === this.closed && closed) return this.frozen;
    if (!source.startsWith(this.source.slice(0, this.offset)) || this.closed) this.reset();
    this.source = source;
    this.closed = closed;
    if (closed && DEFINITION.test(source)) return this.rereadAll(source);
    const tokens = this.advance(source);
    if (closed) {
      this.frozen = [...this.frozen, ...tokens.filter(isShown)];
      this.offset = source.length;
      return this.frozen;
    }
    return [...this.frozen, ...tokens.filter(isShown)];
  }

  private reset(): void {
    this.frozen = [];
    this.offset = 0;
    this.nextItem = undefined;
  }

  /** Reads what is not frozen and freezes what cannot change any more; returns the rest. */
  private advance(source: string): Token[] {
    const tokens = marked.lexer(source.slice(this.offset)) as Token[];
    if (this.nextItem !== undefined && isList(tokens[0]) && tokens[0].ordered) tokens[0].start = this.nextItem;
    // A line without its end may yet turn out to go on with the block before it.
    const last = lastBegun(tokens);
    if (last <= 0 || !this.freeze(source, tokens.slice(0, last))) return this.splitList(source, tokens);
    this.nextItem = undefined;
    return this.splitList(source, tokens.slice(last));
  }

  /** Freezes blocks that stand at the offset; false where the lexer changed their text, so that lengths say nothing. */
  private freeze(source: string, done: readonly Token[]): boolean {
    const text = done.map((token) => token.raw).join("");
    if (!source.startsWith(text, this.offset)) return false;
    this.frozen = [...this.frozen, ...done.filter(isShown)];
    this.offset += text.length;
    return true;
  }

  private splitList(source: string, tokens: Token[]): Token[] {
    const [list, ...others] = tokens;
    if (!isList(list) || list.items.length <= MAX_ITEMS) return tokens;
    const [whole, rest] = [list.items.slice(0, -KEPT_ITEMS), list.items.slice(-KEPT_ITEMS)];
    const raw = (items: readonly Tokens.ListItem[]) => items.map((item) => item.raw).join("");
    const head: ListPart = { ...list, items: whole, raw: raw(whole), part: true };
    if (!this.freeze(source, [head])) return tokens;
    this.nextItem = list.ordered ? Number(list.start) + whole.length : undefined;
    return [{ ...list, items: rest, raw: raw(rest), start: this.nextItem ?? "" }, ...others];
  }

  /** A definition of a link may stand after its use: everything is read again, and what is the same is kept. */
  private rereadAll(source: string): readonly Block[] {
    const before = this.frozen;
    this.frozen = readBlocks(source).map((block, index) => {
      const old = before[index];
      return old && JSON.stringify(old) === JSON.stringify(block) ? old : block;
    });
    this.offset = source.length;
    return this.frozen;
  }
}

const isList = (token: Token | undefined): token is Tokens.List => token?.type === "list";

/** The last block whose first line is whole. */
function lastBegun(tokens: readonly Token[]): number {
  let isWhole = false;
  return tokens.findLastIndex((token) => {
    isWhole ||= token.raw.includes("\n");
    return isWhole && token.type !== "space";
  });
}

const isShown = (token: Token): boolean => token.type !== "space" && token.type !== "def";

/** Whether a fenced block has its closing fence; an indented one is always whole. */
export function isFenceClosed(raw: string): boolean {
  const opening = /^ {0,3}(`{3,}|~{3,})/.exec(raw);
  if (!opening) return true;
  const fence = opening[1]!;
  return new RegExp(`\\n {0,3}${fence[0]}{${fence.length},}[ \\t]*\\n*$`).test(raw);
}
