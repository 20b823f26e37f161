// SPDX-License-Identifier: MIT
// A branch of a conversation -> Markdown for other programs. What is in a message cannot reach into the next one: a
// fence that was left open is closed, and HTML that would swallow what follows is text, as it is on the page.

import { fenced } from "./files.ts";
import { type AssistantMessage, type Message, type Step, textOf, type ToolCall } from "./types.ts";

/** The words that stand between what was said. */
export interface MarkdownWords {
  you: string;
  model: (name: string) => string;
  thoughts: string;
  toolCall: string;
  result: string;
}

export function asMarkdown(title: string, path: readonly Message[], words: MarkdownWords, thoughts: boolean): string {
  const parts = path.flatMap((message) =>
    message.role === "user" ? [`## ${plain(words.you)}`, contained(textOf(message))] : answer(message, words, thoughts),
  );
  return `${[`# ${plain(title)}`, ...parts].join("\n\n")}\n`;
}

function answer(message: AssistantMessage, words: MarkdownWords, thoughts: boolean): string[] {
  const step = ({ reasoning, text, calls }: Step) => [
    ...(thoughts && reasoning.trim() ? [`<details>\n<summary>${words.thoughts}</summary>`, contained(reasoning, FOLDS), "</details>"] : []),
    ...(text.trim() ? [contained(text)] : []),
    ...calls.flatMap((call) => toolCall(call, words)),
  ];
  return [`## ${plain(words.model(message.model))}`, ...message.steps.flatMap(step)];
}

function toolCall({ name, arguments: given, result }: ToolCall, words: MarkdownWords): string[] {
  const call = [`**${words.toolCall}:** ${plain(name)}`, fenced(indented(given), "json")];
  return result === undefined ? call : [...call, `${words.result}:`, fenced(result)];
}

function indented(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // as the model wrote it
  }
}

const SWALLOWS = /^( {0,3})<(?=[!?]|(?:script|pre|style|textarea)\b)/gi; // all up to its own end
const FOLDS = /<(?=\/?(?:details|summary)\b)/gi;

function contained(text: string, tags?: RegExp): string {
  let open = ""; // the fence that the line is in
  const lines = text.trim().split("\n").map((line) => {
    const [, marks, rest] = /^ {0,3}(`{3,}|~{3,})(.*)$/.exec(line) ?? [];
    const wasOpen = open;
    if (marks && rest !== undefined) {
      if (!open) open = marks[0] === "`" && rest.includes("`") ? "" : marks;
      else if (marks.startsWith(open) && !rest.trim()) open = "";
    }
    if (wasOpen || open) return line;
    const safe = line.replace(SWALLOWS, "$1\\<");
    return tags ? safe.replace(tags, "\\<") : safe;
  });
  return [...lines, ...(open ? [open] : [])].join("\n");
}

/** Text of one line in which no character is a mark. */
const plain = (text: string): string => text.replace(/\s+/g, " ").trim().replace(/[\\`*_[\]<>#~|]/g, "\\$&");
