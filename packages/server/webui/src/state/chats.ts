// SPDX-License-Identifier: MIT
// All conversations, and the one that is shown.

import { batch, computed, signal, type Signal } from "@preact/signals";
import { type Attached, type Conversation, textOf } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import { newId } from "../store/ids.ts";
import { notify } from "./notices.ts";
import { OpenChat } from "./open-chat.ts";
import { go, route } from "./route.ts";
import { startStorage, storage, unsaved } from "./storage.ts";
import { listen, tell } from "./tabs.ts";
import { firstTitle } from "./titles.ts";

const known = signal<ReadonlyMap<string, Signal<Conversation>>>(new Map());
const opened = new Map<string, OpenChat>();
const unkept = new Set<string>(); // what could not be stored is not gone either
const changedElsewhere = new Set<string>(); // while they were being written here

/** The newest first. */
export const conversations = computed<readonly Conversation[]>(() =>
  [...known.value.values()].map((one) => one.value).sort((a, b) => b.updated - a.updated),
);
export const current = signal<OpenChat | null>(null);

/** Reads what is kept; `beside` reads what else there is, each time that another tab may have changed it. */
let begin: () => void;

/** When what is kept has been read and the conversation of the address is open: what is written before goes nowhere. */
export const started = new Promise<void>((resolve) => (begin = resolve));

export async function startChats(beside: () => Promise<void>): Promise<void> {
  const read = async () => {
    await Promise.all([readList(), beside()]);
  };
  await startStorage(read);
  await followRoute().finally(begin);
  route.subscribe(() => void followRoute());
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) read().then(reopenChanged, unsaved);
  });
  listen((ids) => void read().then(() => reopenTold(ids), unsaved));
}

export async function readList(): Promise<void> {
  const before = new Map([...known.peek()].map(([id, one]) => [id, one.peek()]));
  const stored = await storage().conversations();
  const now = known.peek(); // what was begun, changed or deleted here meanwhile is newer than what was read
  const map = new Map([...now].filter(([id]) => !before.has(id) || unkept.has(id)));
  for (const conversation of stored) {
    const { id } = conversation;
    const there = now.get(id);
    if (!there && before.has(id)) continue;
    if (there && there.peek() === before.get(id) && !opened.get(id)?.isBusy) there.value = conversation;
    map.set(id, there ?? signal(conversation));
  }
  known.value = map;
}

/** Reads the shown conversation again where another tab has gone on with it, and leaves one that is gone. */
async function reopenChanged(): Promise<void> {
  const chat = current.value;
  if (!chat || chat.isBusy) return;
  const id = chat.info.peek().id;
  if (!known.value.has(id)) gone(id);
  else if (!chat.hasLeaf) await reopen(id);
}

/** Reads the conversations again that another tab has written; one that is being written here when that is done. */
async function reopenTold(ids: readonly string[]): Promise<void> {
  for (const id of ids) {
    if (opened.get(id)?.isBusy) changedElsewhere.add(id);
    else await reopen(id);
  }
  const shown = current.value?.info.peek().id;
  if (shown && !known.value.has(shown)) gone(shown);
}

/** Leaves a conversation that another tab has deleted: nothing more of it is written. */
function gone(id: string): void {
  if (!known.value.has(id) && !opened.has(id) && current.value?.info.peek().id !== id) return;
  if (unkept.has(id)) return unsaved();
  forget(id);
  notify("info", t.value.deletedElsewhere);
}

let reading: Promise<unknown> = Promise.resolve();

/** Reads a conversation again where it is open and nothing is being written; several one after the other. */
export function reopen(id: string): Promise<void> {
  const read = reading.then(() => readAgain(id));
  reading = read.catch(() => undefined);
  return read;
}

async function readAgain(id: string): Promise<void> {
  const shown = current.value?.info.peek().id === id ? current.value : undefined;
  const path = shown?.path.peek();
  if (opened.get(id)?.isBusy) return;
  opened.delete(id);
  if (!shown) return;
  const read = await openChat(id);
  if (!read || current.value !== shown) return;
  if (shown.path.peek() === path) {
    current.value = read;
    return;
  }
  opened.set(id, shown); // the user went on with it meanwhile
  if (shown.isBusy) changedElsewhere.add(id);
  else await readAgain(id);
}

async function followRoute(): Promise<void> {
  const wanted = route.value;
  if (wanted.page !== "chat" || wanted.id === (current.value?.info.value.id ?? null)) return;
  if (wanted.id === null) {
    current.value = null;
    return;
  }
  const chat = await openChat(wanted.id);
  if (route.value !== wanted) return;
  current.value = chat ?? null;
  if (chat) return;
  go({ page: "chat", id: null }, true);
  notify("info", t.value.notHere);
}

async function openChat(id: string): Promise<OpenChat | undefined> {
  const there = opened.get(id);
  if (there) return there;
  const info = known.value.get(id);
  if (!info) return undefined;
  return adopt(info, new OpenChat(info, await storage().messages(id), storage(), changed, gone));
}

function adopt(info: Signal<Conversation>, chat: OpenChat): OpenChat {
  for (const [id, other] of opened) if (!other.isBusy && other !== current.value) opened.delete(id);
  opened.set(info.value.id, chat);
  return chat;
}

function changed(id: string, change: Partial<Conversation>): void {
  const now = known.value.get(id)?.value;
  if (!now) return gone(id);
  storage().changeConversation(id, change, now).then((isThere) => {
    if (!isThere) return gone(id);
    if (opened.get(id)?.isBusy) return tell(); // what is half written is shown where it is written
    if (changedElsewhere.delete(id)) void reopen(id);
    return tell(id);
  }, unsaved);
}

/** A new conversation with a first message. */
export function beginChat(text: string, start: Pick<Conversation, "model" | "settings" | "tools">, attached: Attached = {}): OpenChat {
  const now = Date.now();
  const info = signal<Conversation>({
    ...start, id: newId(), title: firstTitle(text, attached), renamed: false, created: now, updated: now, leaf: null, pinned: false, folder: null,
  });
  storage().add(info.value, []).catch(() => {
    unkept.add(info.peek().id);
    unsaved();
  });
  const chat = adopt(info, new OpenChat(info, [], storage(), changed, gone));
  batch(() => {
    known.value = new Map(known.value).set(info.value.id, info);
    current.value = chat;
    go({ page: "chat", id: info.value.id });
    chat.send(text, attached);
  });
  return chat;
}

export function rename(id: string, title: string): void {
  if (title.trim()) organize(id, { title: title.trim().slice(0, 200), renamed: true });
}

/** Names, pins or moves a conversation. */
export function organize(id: string, change: Partial<Pick<Conversation, "title" | "renamed" | "pinned" | "folder">>): void {
  const info = known.value.get(id);
  if (!info) return;
  info.value = { ...info.value, ...change };
  changed(id, change);
}

export async function deleteChat(id: string): Promise<void> {
  opened.get(id)?.discard();
  await storage().deleteConversation(id).then(() => tell(id), unsaved);
  forget(id);
}

function forget(id: string): void {
  opened.get(id)?.discard();
  opened.delete(id);
  const others = new Map(known.value);
  others.delete(id);
  known.value = others;
  if (current.value?.info.value.id !== id) return;
  current.value = null;
  if (route.value.page === "chat") go({ page: "chat", id: null }, true);
}

/** Forgets all conversations, and what else is stored. */
export async function deleteChats(): Promise<void> {
  for (const chat of opened.values()) chat.discard();
  opened.clear();
  await storage().clear().then(() => tell(), unsaved);
  known.value = new Map();
  current.value = null;
  go({ page: "chat", id: null }, true);
}

/** Conversations whose title or messages hold all words of a query, the newest first. */
export async function searchChats(query: string, signalled: AbortSignal): Promise<readonly string[]> {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found: string[] = [];
  for (const { id, title } of conversations.peek()) {
    if (signalled.aborted) break;
    if (matches(title, words) || matches(await textOfChat(id), words)) found.push(id);
  }
  return found;
}

async function textOfChat(id: string): Promise<string> {
  const messages = await storage().messages(id);
  return messages.map(textOf).join("\n");
}

function matches(text: string, words: readonly string[]): boolean {
  const lower = text.toLowerCase();
  return words.every((word) => lower.includes(word));
}
