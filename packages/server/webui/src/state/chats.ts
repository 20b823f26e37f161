// All conversations, and the one that is shown.

import { batch, computed, signal, type Signal } from "@preact/signals";
import { titleOf } from "../chat/title.ts";
import type { Conversation } from "../chat/types.ts";
import { newId } from "../store/ids.ts";
import { OpenChat } from "./open-chat.ts";
import { go, route } from "./route.ts";
import { startStorage, storage, unsaved } from "./storage.ts";

const known = signal<ReadonlyMap<string, Signal<Conversation>>>(new Map());
const opened = new Map<string, OpenChat>();

/** The newest first. */
export const conversations = computed<readonly Conversation[]>(() =>
  [...known.value.values()].map((one) => one.value).sort((a, b) => b.updated - a.updated),
);
export const current = signal<OpenChat | null>(null);

/** Reads what is kept; `beside` reads what else there is, each time that another tab may have changed it. */
export async function startChats(beside: () => Promise<void>): Promise<void> {
  const read = async () => {
    await Promise.all([readList(), beside()]);
  };
  await startStorage(read);
  await followRoute();
  route.subscribe(() => void followRoute());
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) read().then(reopenChanged, unsaved);
  });
}

export async function readList(): Promise<void> {
  const stored = await storage().conversations();
  const map = new Map<string, Signal<Conversation>>();
  for (const conversation of stored) {
    const there = known.value.get(conversation.id);
    if (there && !opened.get(conversation.id)?.isBusy) there.value = conversation;
    map.set(conversation.id, there ?? signal(conversation));
  }
  known.value = map;
}

/** Reads the shown conversation again where another tab has gone on with it, and leaves one that is gone. */
async function reopenChanged(): Promise<void> {
  const chat = current.value;
  if (!chat || chat.isBusy) return;
  const id = chat.info.peek().id;
  if (known.value.has(id) && chat.hasLeaf) return;
  await reopen(id);
  if (!current.value && route.value.page === "chat") go({ page: "chat", id: null }, true);
}

/** Reads a conversation again where it is open and nothing is being written. */
export async function reopen(id: string): Promise<void> {
  if (opened.get(id)?.isBusy) return;
  opened.delete(id);
  if (current.value?.info.peek().id === id) current.value = (await openChat(id)) ?? null;
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
  if (!chat) go({ page: "chat", id: null }, true);
}

async function openChat(id: string): Promise<OpenChat | undefined> {
  const there = opened.get(id);
  if (there) return there;
  const info = known.value.get(id);
  if (!info) return undefined;
  return adopt(info, new OpenChat(info, await storage().messages(id), storage(), changed));
}

function adopt(info: Signal<Conversation>, chat: OpenChat): OpenChat {
  for (const [id, other] of opened) if (!other.isBusy && other !== current.value) opened.delete(id);
  opened.set(info.value.id, chat);
  return chat;
}

function changed(conversation: Conversation): void {
  storage().putConversation(conversation).catch(unsaved);
}

/** A new conversation with a first message. */
export function beginChat(text: string, start: Pick<Conversation, "model" | "settings" | "tools">): OpenChat {
  const now = Date.now();
  const info = signal<Conversation>({
    ...start, id: newId(), title: titleOf(text), renamed: false, created: now, updated: now, leaf: null, pinned: false, folder: null,
  });
  const chat = adopt(info, new OpenChat(info, [], storage(), changed));
  batch(() => {
    known.value = new Map(known.value).set(info.value.id, info);
    current.value = chat;
    go({ page: "chat", id: info.value.id });
    chat.send(text);
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
  changed(info.value);
}

export async function deleteChat(id: string): Promise<void> {
  opened.get(id)?.discard();
  opened.delete(id);
  await storage().deleteConversation(id).catch(unsaved);
  const others = new Map(known.value);
  others.delete(id);
  known.value = others;
  if (current.value?.info.value.id === id) go({ page: "chat", id: null }, true);
}

/** Forgets all conversations, and what else is stored. */
export async function deleteChats(): Promise<void> {
  for (const chat of opened.values()) chat.discard();
  opened.clear();
  await storage().clear().catch(unsaved);
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
  const texts = messages.map((one) => (one.role === "user" ? one.text : one.steps.map((step) => step.text).join("\n")));
  return texts.join("\n");
}

function matches(text: string, words: readonly string[]): boolean {
  const lower = text.toLowerCase();
  return words.every((word) => lower.includes(word));
}
