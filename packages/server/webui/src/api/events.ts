// SPDX-License-Identifier: MIT
// Server-sent events out of bytes that may be cut anywhere.

/** Takes bytes as they come and gives the data of each event that is complete. */
export class EventReader {
  private readonly decoder = new TextDecoder("utf-8");
  private rest = "";
  private data: string[] = [];

  push(bytes: Uint8Array): string[] {
    return this.read(this.decoder.decode(bytes, { stream: true }));
  }

  private read(text: string): string[] {
    const events: string[] = [];
    this.rest += text;
    // A lone CR at the end may be half of a CR LF.
    let start = 0;
    for (;;) {
      const end = lineEnd(this.rest, start);
      if (end === undefined) break;
      this.line(this.rest.slice(start, end.at), events);
      start = end.next;
    }
    this.rest = this.rest.slice(start);
    return events;
  }

  private line(line: string, events: string[]): void {
    if (line === "") {
      if (this.data.length) events.push(this.data.join("\n"));
      this.data = [];
    } else if (line.startsWith("data:")) {
      this.data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

function lineEnd(text: string, from: number): { at: number; next: number } | undefined {
  for (let at = from; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (code === 10) return { at, next: at + 1 };
    if (code === 13) {
      if (at + 1 === text.length) return undefined;
      return { at, next: text.charCodeAt(at + 1) === 10 ? at + 2 : at + 1 };
    }
  }
  return undefined;
}
