// SPDX-License-Identifier: MIT
// What goes out as a file, and what comes in.

import { asMarkdown } from "../chat/as-markdown.ts";
import { MessageTree } from "../chat/tree.ts";
import type { Conversation } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import { type Archive, exportText, type Imported, importText, missing, newPrompts, Places } from "../store/transfer.ts";
import { conversations, deleteChats, readList, reopen } from "./chats.ts";
import { folders, keepFolders, readFolders } from "./folders.ts";
import { keepPrompts, prompts, readPrompts } from "./prompts.ts";
import { storage } from "./storage.ts";
import { tell } from "./tabs.ts";

/** The conversations and, with all of them, the prompts. */
export async function exportChats(ids: readonly string[], isAll = false): Promise<string> {
  const chosen = new Set(ids);
  const wanted = conversations.peek().filter((one) => chosen.has(one.id));
  const archives = await Promise.all(wanted.map(archiveOf));
  return exportText({ folders: folders.peek().filter(({ id }) => wanted.some((one) => one.folder === id)), prompts: isAll ? prompts.peek() : [], archives });
}

/** The branch that is shown, with its thoughts folded in or without them. */
export async function exportMarkdown({ id, title, leaf }: Conversation, thoughts: boolean): Promise<string> {
  const messages = new Map((await storage().messages(id)).map((one) => [one.id, one]));
  const path = new MessageTree(messages.values()).path(leaf).map((one) => messages.get(one)!);
  const words = { you: t.value.you, model: t.value.answerOf, thoughts: t.value.thought(""), toolCall: t.value.toolCallWord, result: t.value.result };
  return asMarkdown(title, path, words, thoughts);
}

async function archiveOf(conversation: Conversation): Promise<Archive> {
  const messages = await storage().messages(conversation.id);
  return { conversation, messages: messages.map(({ conversation: _, ...message }) => message) };
}

/** Adds what a file holds and is not here. Nothing that is here is changed or deleted. */
export async function importChats(text: string): Promise<Imported> {
  const { archives, folders: named, prompts: theirPrompts, broken } = importText(text);
  await Promise.all([readList(), readLibrary()]);
  const unknown = newPrompts(prompts.peek(), theirPrompts);
  keepPrompts(unknown);
  const count: Imported = { added: 0, grown: 0, same: 0, broken, prompts: unknown.length };
  const here = new Map(conversations.peek().map((one) => [one.id, one]));
  const taken = new Set(await storage().messageIds());
  const grown: string[] = [];
  const place = new Places(folders.peek(), named);
  for (const theirs of archives) {
    const ours = here.get(theirs.conversation.id);
    const more = missing(ours && (await archiveOf(ours)), theirs, (id) => taken.has(id));
    count[!ours ? "added" : more ? "grown" : "same"]++;
    if (!more) continue;
    const conversation = ours ? more.conversation : { ...more.conversation, folder: place.of(more.conversation.folder) };
    await storage().add(conversation, more.messages);
    here.set(conversation.id, conversation);
    for (const { id } of more.messages) taken.add(id);
    if (ours) grown.push(ours.id);
  }
  await readList();
  for (const id of grown) await reopen(id);
  keepFolders(place.added);
  tell(...grown);
  return count;
}

export async function deleteAll(): Promise<void> {
  await deleteChats();
  await readLibrary();
}

/** Reads what there is besides conversations. */
export async function readLibrary(): Promise<void> {
  await Promise.all([readFolders(), readPrompts()]);
}
