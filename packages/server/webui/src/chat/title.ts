// SPDX-License-Identifier: MIT
// Names of conversations: the first line of the question, until the model has made one of question and answer.

import { type Message, textOf } from "./types.ts";

const MAX_TITLE = 60; // characters
const MAX_READ = 2000; // of a message, from its beginning: what a chat is about stands there
const MAX_TOKENS = 40;
const ASKED = "Write a title for this conversation, in its language and in two to six words. Answer with the title alone.";

/** The first line of a text, shortened at a space. */
export function titleOf(text: string): string {
  const line = text.trim().split("\n", 1)[0]!.trim().replace(/\s+/g, " ");
  if (line.length <= MAX_TITLE) return line;
  const cut = line.slice(0, MAX_TITLE - 1).replace(/[\ud800-\udbff]$/, "");
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), MAX_TITLE / 2)).trimEnd()}…`;
}

/** What is asked of the model: short, after everybody else, without thoughts and tools. */
export function titleRequest(model: string, path: readonly Message[], system: string | undefined, thinks: boolean): object {
  const said = path.slice(0, 2).map((one) => ({ role: one.role, content: textOf(one).slice(0, MAX_READ) }));
  return {
    model,
    // As the chat begins, so that the server has read most of it already.
    messages: [...(system?.trim() ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: ASKED }],
    stream: true,
    max_completion_tokens: MAX_TOKENS,
    temperature: 0,
    priority: 1,
    tools: [], // else the server would offer those of its MCP servers
    ...(thinks ? { enable_thinking: false } : {}),
  };
}

/** Whether there is enough of an answer to know its first line. */
export const hasLine = (answer: string): boolean => answer.trimStart().includes("\n");

/** The title in a model's answer: its first line without quotes and Markdown, or "" where it can be none. */
export function readTitle(answer: string): string {
  const first = answer.trim().split("\n", 1)[0]!.slice(0, 400);
  if (/^[<{]|[:：]$/.test(first)) return ""; // a tag, a call, or an announcement
  const plain = first
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "")
    .replace(/!?\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/\*+|`+|~~|__/g, "")
    .replace(/^(?:#+|[->+])\s+/, "")
    .replace(/^(?:title|titel)\s*:\s*/i, "")
    .replace(/^[\s"'“”„‟‘’‚«»‹›「」_]+|[\s"'“”„‟‘’‚«»‹›「」_]+$/g, "")
    .replace(/(?<!\.)\.$/, "");
  const looksRight = /[\p{L}\p{N}]/u.test(plain) && first.length < 400 && plain.split(/\s+/).length <= 16;
  return looksRight ? titleOf(plain) : "";
}
