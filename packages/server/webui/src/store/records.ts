// SPDX-License-Identifier: MIT
// What is kept of conversations, folders and prompts, read field by field: from the database, where an older page may have
// written it, and from files.

import { fields, number, text } from "../api/readers.ts";
import { readSettings } from "../chat/settings.ts";
import type { Conversation, Folder, Prompt } from "../chat/types.ts";
import { newId } from "./ids.ts";

export const MAX_NAME = 80; // of a folder or a prompt

export const isId = (id: unknown): id is string => typeof id === "string" && /^[0-9a-f]{32}$/.test(id);

/** An id that can stand here; a new one for any other. */
export const ownId = (id: unknown): string => (isId(id) ? id : newId());

/** Not later than now: a clock that was wrong elsewhere would put a conversation at the head for good. */
export function timeOf(value: unknown): number | undefined {
  const time = number(value);
  return time === undefined ? undefined : Math.min(Math.max(0, time), Date.now());
}

/** A conversation; undefined where it is none. */
export function readConversation(data: unknown): Conversation | undefined {
  const given = fields(data);
  if (typeof given.title !== "string") return undefined;
  const read: Conversation = {
    id: ownId(given.id),
    title: given.title.slice(0, 500),
    renamed: given.renamed === true,
    created: timeOf(given.created) ?? Date.now(),
    updated: timeOf(given.updated) ?? Date.now(),
    model: text(given.model) ?? null,
    settings: readSettings(given.settings),
    leaf: text(given.leaf) ?? null,
    pinned: given.pinned === true,
    folder: isId(given.folder) ? given.folder : null,
  };
  if (Array.isArray(given.tools)) read.tools = given.tools.filter((one) => typeof one === "string");
  return read;
}

/** A folder, or nothing. */
export function readFolder(data: unknown): Folder[] {
  const given = fields(data);
  const name = text(given.name)?.trim().slice(0, MAX_NAME);
  if (!name || !isId(given.id)) return [];
  return [{ id: given.id, name, created: timeOf(given.created) ?? 0, isOpen: given.isOpen === true }];
}

/** A prompt, or nothing. */
export function readPrompt(data: unknown): Prompt[] {
  const given = fields(data);
  const [name, said] = [text(given.name)?.trim().slice(0, MAX_NAME), text(given.text)];
  if (!name || !said?.trim() || !isId(given.id)) return [];
  return [{ id: given.id, name, kind: given.kind === "system" ? "system" : "message", text: said, updated: timeOf(given.updated) ?? 0 }];
}
