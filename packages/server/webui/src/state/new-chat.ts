// SPDX-License-Identifier: MIT
// Model, settings and tools of the conversation that is shown, or of the one that the next message begins.

import { computed, signal } from "@preact/signals";
import type { Attached, ChatSettings, Conversation } from "../chat/types.ts";
import { beginChat, current, started } from "./chats.ts";

type Start = Pick<Conversation, "model" | "settings" | "tools">;

const next = signal<Start>({ model: null, settings: {} });

export const shownStart = computed<Start>(() => current.value?.info.value ?? next.value);

export function changeStart(change: Partial<Start>): void {
  const chat = current.peek();
  if (chat) chat.update(change);
  else next.value = { ...next.value, ...change };
}

export const changeChatSettings = (settings: ChatSettings): void => changeStart({ settings });

/** Sends a message to the conversation that is shown, or begins one. */
export async function sendMessage(text: string, attached: Attached = {}): Promise<void> {
  await started;
  const chat = current.peek();
  if (chat) {
    chat.send(text, attached);
    return;
  }
  const start = next.value;
  next.value = { model: null, settings: {} }; // the last choice is a preference
  beginChat(text, start, attached);
}
