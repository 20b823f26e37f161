// SPDX-License-Identifier: MIT
// The text of a formula and the place that is being read.

/** Something that is not known here: the formula is shown as it was written. */
export class Unknown extends Error {}

export class Scanner {
  protected at = 0;

  constructor(protected readonly source: string) {}

  get isAtEnd(): boolean {
    this.skipSpace();
    return this.at >= this.source.length;
  }

  /** Text in braces as it stands. */
  protected raw(): string {
    this.skipSpace();
    this.expect("{");
    const start = this.at;
    let open = 1;
    for (; this.at < this.source.length; this.at++) {
      const mark = this.source[this.at];
      if (mark === "{") open++;
      if (mark === "}" && --open === 0) return this.source.slice(start, this.at++).replace(/\\([$%&#_{}])/g, "$1");
    }
    throw new Unknown();
  }

  protected expect(text: string): void {
    if (!this.source.startsWith(text, this.at)) throw new Unknown();
    this.at += text.length;
  }

  protected take(length: number): string {
    return this.source.slice(this.at, (this.at += length));
  }

  protected skipSpace(): void {
    while (this.at < this.source.length && /\s/.test(this.source[this.at]!)) this.at++;
  }
}
