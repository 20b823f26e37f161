// Export and import: one JSON document with conversations. What comes in is checked piece by piece, and gets new ids.

import { fields, number, readContent, readLogprob, readUsage, text } from "../api/readers.ts";
import { readSettings } from "../chat/settings.ts";
import type { AnswerState, AssistantMessage, CallState, Conversation, Message, Step, ToolCall } from "../chat/types.ts";
import { newId } from "./ids.ts";

export interface Archive {
  conversation: Conversation;
  messages: Message[];
}

const FORMAT = "candle-vllm-conversations";
export const MAX_IMPORT_BYTES = 256 * 1024 * 1024;
const MAX_CONVERSATIONS = 100_000;

export function exportText(archives: readonly Archive[]): string {
  return JSON.stringify({ format: FORMAT, version: 1, conversations: archives }, null, 1);
}

export class ImportError extends Error {}

/** Reads an exported text; ImportError where it is none. Broken conversations are left out and counted. */
export function importText(text: string): { archives: Archive[]; broken: number } {
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch {
    throw new ImportError("not JSON");
  }
  const { format, version, conversations } = fields(document);
  if (format !== FORMAT || version !== 1 || !Array.isArray(conversations)) throw new ImportError("another format");
  const archives = conversations.slice(0, MAX_CONVERSATIONS).map(readArchive);
  const whole = archives.filter((archive) => archive !== undefined);
  return { archives: whole, broken: conversations.length - whole.length };
}

function readArchive(data: unknown): Archive | undefined {
  const { conversation, messages } = fields(data);
  const given = fields(conversation);
  if (typeof given.title !== "string" || !Array.isArray(messages)) return undefined;
  const ids = new Map<string, string>();
  for (const message of messages) {
    const { id } = fields(message);
    if (typeof id === "string") ids.set(id, newId());
  }
  const read = messages.map((message) => readMessage(message, ids));
  if (read.includes(undefined)) return undefined;
  return {
    conversation: {
      id: newId(),
      title: given.title.slice(0, 500),
      renamed: given.renamed === true,
      created: timeOf(given.created) ?? Date.now(),
      updated: timeOf(given.updated) ?? Date.now(),
      model: text(given.model) ?? null,
      settings: readSettings(given.settings),
      leaf: ids.get(text(given.leaf) ?? "") ?? null,
    },
    messages: read as Message[],
  };
}

function readMessage(data: unknown, ids: ReadonlyMap<string, string>): Message | undefined {
  const given = fields(data);
  const id = ids.get(text(given.id) ?? "");
  if (!id) return undefined;
  const base = { id, parent: ids.get(text(given.parent) ?? "") ?? null, created: timeOf(given.created) ?? 0 };
  if (given.role === "user" && typeof given.text === "string") return { ...base, role: "user", text: given.text };
  if (given.role !== "assistant" || !Array.isArray(given.steps)) return undefined;
  const message: AssistantMessage = {
    ...base,
    role: "assistant",
    model: text(given.model) ?? "",
    steps: given.steps.map(readStep),
    state: answerState(given.state),
  };
  return message;
}

// Not later than now: a clock that was wrong elsewhere would put a conversation at the head for good.
function timeOf(value: unknown): number | undefined {
  const time = number(value);
  return time === undefined ? undefined : Math.min(Math.max(0, time), Date.now());
}

// An answer that is not at its end came from a page that no longer writes it.
const answerState = (state: unknown): AnswerState => (state === "done" || state === "failed" ? state : "stopped");

function readStep(data: unknown): Step {
  const given = fields(data);
  const step: Step = {
    reasoning: text(given.reasoning) ?? "",
    text: text(given.text) ?? "",
    calls: Array.isArray(given.calls) ? given.calls.map(readCall) : [],
  };
  for (const name of ["reasoningMs", "firstTokenMs", "totalMs"] as const) {
    const value = number(given[name]);
    if (value !== undefined) step[name] = value;
  }
  const finish = text(given.finish);
  if (finish !== undefined) step.finish = finish;
  const usage = readUsage(given.usage);
  if (usage) step.usage = usage;
  if (Array.isArray(given.logprobs)) step.logprobs = given.logprobs.flatMap(readLogprob);
  return step;
}

const CALL_STATES: readonly CallState[] = ["done", "failed", "denied", "unknown"];

function readCall(data: unknown): ToolCall {
  const given = fields(data);
  const state = CALL_STATES.find((one) => one === given.state) ?? "denied"; // nothing that is imported may run
  const call: ToolCall = {
    id: text(given.id) ?? newId(),
    name: text(given.name) ?? "",
    arguments: text(given.arguments) ?? "",
    state,
  };
  const [result, seconds] = [text(given.result), number(given.seconds)];
  if (result !== undefined) call.result = result;
  if (seconds !== undefined) call.seconds = seconds;
  if (Array.isArray(given.content)) call.content = given.content.map(readContent);
  return call;
}
