// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { marked } from "marked";
import { asMarkdown } from "../src/chat/as-markdown.ts";
import { fenced } from "../src/chat/files.ts";
import type { Message, Step } from "../src/chat/types.ts";

const words = { you: "You", model: (name: string) => `Answer of ${name}`, thoughts: "Thoughts", toolCall: "Tool call", result: "Result" };
const asked = (text: string): Message => ({ id: "u", role: "user", parent: null, created: 1, text });
const said = (...steps: Partial<Step>[]): Message => ({
  id: "a", role: "assistant", parent: "u", created: 2, model: "m_1", state: "done", steps: steps.map((step) => ({ reasoning: "", text: "", calls: [], ...step })),
});
const headings = (text: string) => marked.lexer(text).flatMap((token) => (token.type === "heading" ? [token.raw.trim()] : []));

test("a branch as Markdown", () => {
  const call = { id: "1", name: "get_time", arguments: '{"zone":"UTC"}', state: "done" as const, result: "12:00" };
  const text = asMarkdown("A *title*", [asked("Time?"), said({ reasoning: "Hm", text: "I look.", calls: [call] }, { text: "Noon." })], words, true);
  assert.equal(text, `# A \\*title\\*

## You

Time?

## Answer of m\\_1

<details>
<summary>Thoughts</summary>

Hm

</details>

I look.

**Tool call:** get\\_time

\`\`\`json
{
  "zone": "UTC"
}
\`\`\`

Result:

\`\`\`
12:00
\`\`\`

Noon.
`);
  const without = asMarkdown("A", [asked("Time?"), said({ reasoning: "Hm", text: "Noon." })], words, false);
  assert.equal(without, "# A\n\n## You\n\nTime?\n\n## Answer of m\\_1\n\nNoon.\n");
});

test("a fence is longer than those in it", () => {
  for (const text of ["plain", "```js\n1\n```", "a ````` b", "~~~"]) {
    const [block, ...more] = marked.lexer(fenced(text, "md"));
    assert.deepEqual([block!.type, (block as { text?: string }).text, more.length], ["code", text, 0], text);
  }
});

test("what stands in a message ends with it", () => {
  const nested = "````md\n```js\n1\n```\n````";
  for (const text of [
    "```js\nlet a", "~~~\n```\n", "````md\n```\ncode\n```", "```a\n```b", "<!-- never closed", "<pre>\n# x", "<script>", "<?php",
    "  ~~~~ js\n~~~", nested, "a\n```\nb\n```\nc", "```not`a fence",
  ]) {
    const ends = asMarkdown("T", [asked(text), said({ reasoning: `${text}\n</details>`, text }), asked("after")], words, true);
    assert.deepEqual(headings(ends).filter((one) => one !== "# x"), ["# T", "## You", "## Answer of m\\_1", "## You"], text);
    const folds = marked.lexer(ends).filter((token) => token.type === "html").map((token) => token.raw.trim());
    assert.deepEqual(folds, ["<details>\n<summary>Thoughts</summary>", "</details>"], text);
  }
  assert.ok(asMarkdown("T", [asked(nested)], words, true).includes(`\n${nested}\n`));
});
