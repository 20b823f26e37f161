// SPDX-License-Identifier: MIT
// What a conversation consists of. Everything here is plain data: it is kept in IndexedDB and exported as it is.

import type { ErrorInfo } from "../api/http.ts";
import { withFiles } from "./files.ts";
import type { McpContent, TokenLogprob, Usage } from "../api/types.ts";

/** Where a tool call stands; "waiting" needs the user's word, "approved" will run. */
export type CallState = "writing" | "waiting" | "approved" | "running" | "done" | "failed" | "denied" | "unknown";

export interface ToolCall {
  id: string;
  name: string;
  arguments: string; // JSON as the model wrote it, which need not be valid
  state: CallState;
  result?: string; // what the model is told
  content?: McpContent[]; // what the tool gave, for the card
  seconds?: number;
}

/** One answer of the model; an assistant's message has several where tools were called between them. */
export interface Step {
  reasoning: string;
  reasoningMs?: number;
  text: string;
  calls: ToolCall[];
  finish?: string;
  usage?: Usage;
  firstTokenMs?: number;
  read?: number; // share of the prompt that has been computed, until the first token
  totalMs?: number;
  logprobs?: TokenLogprob[];
}

/** A text file that goes with a question. */
export interface TextFile {
  name: string;
  text: string;
}

export interface UserMessage {
  id: string;
  role: "user";
  parent: string | null;
  created: number;
  text: string;
  images?: readonly string[]; // data URLs
  files?: readonly TextFile[];
}

/** What goes with the text of a question. */
export type Attached = Pick<UserMessage, "images" | "files">;

export type AnswerState = "streaming" | "waiting" | "done" | "stopped" | "failed";

export interface AssistantMessage {
  id: string;
  role: "assistant";
  parent: string | null;
  created: number;
  model: string;
  steps: Step[];
  state: AnswerState;
  error?: ErrorInfo;
}

export type Message = UserMessage | AssistantMessage;

/** Settings of requests; a missing one is left to the chat's wider settings, then to the server. */
export interface ChatSettings {
  system?: string;
  temperature?: number;
  topP?: number;
  topK?: number;
  minP?: number;
  maxTokens?: number;
  presencePenalty?: number;
  frequencyPenalty?: number;
  repetitionPenalty?: number;
  seed?: number;
  stop?: string[];
  thinking?: boolean;
  logprobs?: boolean;
  schema?: string; // JSON schema that answers have to follow
}

export interface Conversation {
  id: string;
  title: string;
  renamed: boolean; // the title is the user's
  created: number;
  updated: number;
  model: string | null;
  settings: ChatSettings;
  tools?: readonly string[]; // names of the tools that are on; none until somebody turns them on
  leaf: string | null; // the last message of the branch that is shown
  pinned: boolean;
  folder: string | null; // the id of one
}

export interface Folder {
  id: string;
  name: string;
  created: number;
  isOpen: boolean;
}

/** A text that is kept for use again: a message to write, or the system prompt of a chat. */
export interface Prompt {
  id: string;
  name: string;
  kind: "message" | "system";
  text: string;
  updated: number;
}

export const emptyStep = (): Step => ({ reasoning: "", text: "", calls: [] });

/** Whether the model ended its step, so that nothing is missing. */
export const isWhole = (step: Step): boolean => step.finish === "stop" || step.finish === "tool_calls";

/** The text of a question with its files, or of an answer without thoughts and tools. */
export function textOf(message: Message): string {
  if (message.role === "user") return withFiles(message);
  return message.steps
    .map((step) => step.text)
    .filter(Boolean)
    .join("\n\n");
}
