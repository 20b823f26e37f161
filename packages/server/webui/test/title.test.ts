// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { readTitle, titleOf, titleRequest } from "../src/chat/title.ts";
import type { Message } from "../src/chat/types.ts";

test("a title is one line without quotes and Markdown", () => {
  for (const [answer, title] of [
    ["Sailing boats", "Sailing boats"],
    ["\n  \"Sailing boats.\"\n\nThis title is good.", "Sailing boats"],
    ["**Title:** “Sailing *boats*”", "Sailing boats"],
    ["# Titel: „Segelboote“", "Segelboote"],
    ["- `git rebase` for __beginners__", "git rebase for beginners"],
    ["[Boats](https://evil.example) and more", "Boats and more"],
    ["What is a snake_case_name?", "What is a snake_case_name?"],
    ["To be continued...", "To be continued..."],
    ["a\u202eb\u0007c", "abc"],
    ["<script>x</script>", ""],
    ["<think>I should", ""],
    ['{"name": "tool"}', ""],
    ["Sure! Here is a title:\nBoats", ""],
    ["Hier ist ein Titel：", ""],
    ["***", ""],
    ["", ""],
    ["word ".repeat(20), ""],
    ["x".repeat(500), ""],
  ] as const) assert.equal(readTitle(answer), title, answer);
  const long = readTitle("Everything that you have always wanted to know about small sailing boats");
  assert.equal(long, "Everything that you have always wanted to know about small…");
});

test("a title has at most 60 characters", () => {
  for (const text of ["x".repeat(61), "\u{1f600}".repeat(40), "word ".repeat(30), "a".repeat(59) + " b"]) {
    const title = titleOf(text);
    assert.ok(title.length <= 60 && title.endsWith("…") && !/[\ud800-\udbff]…/.test(title), title);
  }
  assert.equal(titleOf("  One\tline \nand another"), "One line");
  assert.equal(titleOf("x".repeat(60)), "x".repeat(60));
});

test("what is asked for a title is short, and only of what was said", () => {
  const path: Message[] = [
    { id: "u", role: "user", parent: null, created: 1, text: "q".repeat(5000) },
    { id: "a", role: "assistant", parent: "u", created: 2, model: "m", state: "done", steps: [{ reasoning: "hm", text: "answer", calls: [] }] },
    { id: "u2", role: "user", parent: "a", created: 3, text: "next" },
  ];
  const request = titleRequest("m", path, " ", false) as { messages: { role: string; content: string }[]; enable_thinking?: boolean };
  assert.deepEqual(request.messages.map((one) => [one.role, one.content.length > 2000]), [["user", false], ["assistant", false], ["user", false]]);
  assert.equal(request.messages[1]!.content, "answer");
  assert.equal("enable_thinking" in request, false);
  assert.deepEqual((titleRequest("m", path, "Be brief.", true) as typeof request).messages[0], { role: "system", content: "Be brief." });
});
