// SPDX-License-Identifier: MIT
// Export and import: one JSON document with conversations. What comes in is checked piece by piece. Ids stay, so that
// what is here already is known again; nothing that is here gives way.

import { fields, number, readContent, readLogprob, readUsage, text } from "../api/readers.ts";
import { keptFiles } from "../chat/files.ts";
import { keptImages } from "../chat/images.ts";
import { MessageTree } from "../chat/tree.ts";
import type { AnswerState, AssistantMessage, CallState, Conversation, Folder, Message, Prompt, Step, ToolCall } from "../chat/types.ts";
import { newId } from "./ids.ts";
import { ownId, readConversation, readFolder, readPrompt, timeOf } from "./records.ts";

export interface Archive {
  conversation: Conversation;
  messages: Message[];
}

export interface Imported {
  added: number; // conversations that were not here
  grown: number; // that were here with fewer messages
  same: number;
  broken: number;
  prompts: number; // that were not here
}

const FORMAT = "candle-vllm-conversations";
export const MAX_IMPORT_BYTES = 256 * 1024 * 1024;
const MAX_CONVERSATIONS = 100_000;
const MAX_RECORDS = 10_000; // folders, and prompts

/** What a file holds. */
export interface Exported {
  folders: readonly Folder[];
  prompts: readonly Prompt[];
  archives: readonly Archive[];
}

export function exportText({ folders, prompts, archives }: Exported): string {
  return JSON.stringify({ format: FORMAT, version: 1, folders, prompts, conversations: archives }, null, 1);
}

export class ImportError extends Error {}

/** Reads an exported text; ImportError where it is none. Broken conversations are left out and counted. */
export function importText(text: string): Exported & { broken: number } {
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch {
    throw new ImportError("not JSON");
  }
  const { format, version, folders, prompts, conversations } = fields(document);
  if (format !== FORMAT || version !== 1 || !Array.isArray(conversations)) throw new ImportError("another format");
  const archives = conversations.slice(0, MAX_CONVERSATIONS).map(readArchive);
  const whole = archives.filter((archive) => archive !== undefined);
  const records = <T>(given: unknown, read: (data: unknown) => T[]) => (Array.isArray(given) ? given.slice(0, MAX_RECORDS).flatMap(read) : []);
  return {
    folders: records(folders, readFolder), prompts: records(prompts, readPrompt), archives: whole, broken: conversations.length - whole.length,
  };
}

function readArchive(data: unknown): Archive | undefined {
  const { conversation, messages } = fields(data);
  const read = readConversation(conversation);
  if (!read || !Array.isArray(messages)) return undefined;
  const ids = new Map<string, string>();
  for (const message of messages) {
    const { id } = fields(message);
    if (typeof id === "string") ids.set(id, ownId(id));
  }
  const whole = messages.map((message) => readMessage(message, ids));
  if (whole.includes(undefined)) return undefined;
  const { tools: _, ...others } = read; // are for here to be chosen
  return {
    conversation: { ...others, leaf: ids.get(read.leaf ?? "") ?? null },
    messages: [...new Map((whole as Message[]).map((one) => [one.id, one])).values()],
  };
}

/**
 * What `theirs` has that is not in `ours`, the same conversation as it is here: the messages to add, and the
 * conversation as it is with them; undefined where nothing is missing. A message that is here stays as it is: one that
 * has gone on elsewhere comes in beside it, as another version. `isTaken` knows the ids of all messages that are here.
 */
export function missing(ours: Archive | undefined, theirs: Archive, isTaken: (id: string) => boolean): Archive | undefined {
  const { messages, placed } = newMessages(ours?.messages ?? [], theirs.messages, isTaken);
  const leaf = placed.get(theirs.conversation.leaf ?? "") ?? null;
  if (!ours) return { conversation: { ...theirs.conversation, leaf }, messages };
  if (!messages.length) return undefined;
  const tree = new MessageTree([...ours.messages, ...messages]);
  const shown = ours.conversation.leaf;
  // What is shown stays so, but for what now follows it: there is no other way to that from here.
  const follows = shown === null || tree.path(leaf).includes(shown);
  const updated = Math.max(ours.conversation.updated, theirs.conversation.updated);
  return { conversation: { ...ours.conversation, leaf: follows ? leaf : tree.leafBelow(shown), updated }, messages };
}

function newMessages(ours: readonly Message[], theirs: readonly Message[], isTaken: (id: string) => boolean) {
  const here = new Map(ours.map((one) => [one.id, one]));
  const known = new Map(theirs.map((one) => [one.id, one]));
  const placed = new Map<string, string>(); // by their id: the id that it has here
  const messages: Message[] = [];
  let contents: Map<string, string> | undefined; // ids by what stands in a message
  const place = (message: Message) => {
    const one = { ...message, parent: placed.get(message.parent ?? "") ?? null };
    const same = here.get(one.id);
    if (same && covers(same, one)) return placed.set(one.id, one.id);
    if (!isTaken(one.id)) {
      messages.push(one);
      return placed.set(one.id, one.id);
    }
    contents ??= new Map(ours.map((other) => [contentOf(other), other.id]));
    const copy = contents.get(contentOf(one)) ?? newId();
    if (!here.has(copy)) messages.push({ ...one, id: copy });
    return placed.set(one.id, copy);
  };
  for (const message of theirs) {
    const above = new Set<Message>(); // parents first; in a circle somebody has to begin
    for (let one: Message | undefined = message; one && !placed.has(one.id) && !above.has(one); one = known.get(one.parent ?? "")) above.add(one);
    for (const one of [...above].reverse()) place(one);
  }
  return { messages, placed };
}

/** Whether nothing of what stands in `theirs` is missing in `ours`, which may have gone on. */
function covers(ours: Message, theirs: Message): boolean {
  if (ours.role === "user") return theirs.role === "user" && ours.text === theirs.text;
  return theirs.role === "assistant" && theirs.steps.every((step, at) => {
    const own = ours.steps[at];
    const hasCall = (call: ToolCall, index: number) => {
      const other = own?.calls[index];
      return other?.name === call.name && other.arguments === call.arguments && (call.result === undefined || call.result === other.result);
    };
    return !!own && own.reasoning.startsWith(step.reasoning) && own.text.startsWith(step.text) && step.calls.every(hasCall);
  });
}

function contentOf(message: Message): string {
  if (message.role === "user") return JSON.stringify([message.parent, message.text, ...(message.images ?? []), ...(message.files ?? [])]);
  const steps = message.steps.map(({ reasoning, text, calls }) => [reasoning, text, calls.map((call) => [call.name, call.arguments, call.result])]);
  return JSON.stringify([message.parent, steps, message.role]);
}

function readMessage(data: unknown, ids: ReadonlyMap<string, string>): Message | undefined {
  const given = fields(data);
  const id = ids.get(text(given.id) ?? "");
  if (!id) return undefined;
  const base = { id, parent: ids.get(text(given.parent) ?? "") ?? null, created: timeOf(given.created) ?? 0 };
  if (given.role === "user" && typeof given.text === "string") {
    const images = keptImages(given.images);
    const files = keptFiles(given.files);
    return { ...base, role: "user", text: given.text, ...(images.length ? { images } : {}), ...(files.length ? { files } : {}) };
  }
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

// An answer that is not at its end came from a page that no longer writes it; why one failed is not for here.
const answerState = (state: unknown): AnswerState => (state === "done" ? state : "stopped");

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

/** The folders that conversations of a file come into: the same, those of their names, or new ones. */
export class Places {
  readonly added: Folder[] = [];
  private readonly known: Map<string, string>; // ids here by the file's
  private readonly byName: Map<string, string>;
  private readonly named: Map<string, Folder>;

  constructor(here: readonly Folder[], theirs: readonly Folder[]) {
    this.known = new Map(here.map(({ id }) => [id, id]));
    this.byName = new Map(here.map(({ id, name }) => [name, id]));
    this.named = new Map(theirs.map((one) => [one.id, one]));
  }

  of(folder: string | null): string | null {
    const there = this.named.get(folder ?? "");
    if (!there) return null;
    const { id, name } = there;
    const place = this.known.get(id) ?? this.byName.get(name) ?? id;
    if (place === id && !this.known.has(id)) this.added.push(there);
    this.known.set(id, place);
    this.byName.set(name, place);
    return place;
  }
}

/**
 * The prompts of a file that are not in `ours`. One that was changed here since stays as it is; one that was changed
 * elsewhere comes in beside it.
 */
export function newPrompts(ours: readonly Prompt[], theirs: readonly Prompt[]): Prompt[] {
  const contents = new Set(ours.map(promptContent));
  const here = new Map(ours.map((one) => [one.id, one.updated]));
  const added: Prompt[] = [];
  for (const one of theirs) {
    const since = here.get(one.id);
    if (contents.has(promptContent(one)) || (since !== undefined && since >= one.updated)) continue;
    added.push(since === undefined ? one : { ...one, id: newId() });
    contents.add(promptContent(one));
    here.set(one.id, one.updated);
  }
  return added;
}

const promptContent = ({ name, kind, text: said }: Prompt): string => JSON.stringify([name, kind, said]);
