// SPDX-License-Identifier: MIT
// Folders of conversations. Which conversations are in one stands in these.

import { signal } from "@preact/signals";
import type { Folder } from "../chat/types.ts";
import { newId } from "../store/ids.ts";
import { MAX_NAME, readFolder } from "../store/records.ts";
import { conversations, organize } from "./chats.ts";
import { storage, unsaved } from "./storage.ts";
import { tell } from "./tabs.ts";

/** By name. */
export const folders = signal<readonly Folder[]>([]);

export async function readFolders(): Promise<void> {
  show((await storage().records("folders")).flatMap(readFolder));
}

const show = (all: readonly Folder[]): void => {
  folders.value = [...all].sort((a, b) => a.name.localeCompare(b.name) || a.created - b.created);
};

/** Makes a folder; gives its id. */
export function addFolder(name: string): string {
  const id = newId();
  keepFolders([{ id, name: name.trim().slice(0, MAX_NAME), created: Date.now(), isOpen: true }]);
  return id;
}

export function changeFolder(id: string, change: Partial<Pick<Folder, "name" | "isOpen">>): void {
  const there = folders.peek().find((one) => one.id === id);
  if (there && change.name?.trim() !== "") keepFolders([{ ...there, ...change }]);
}

/** Adds folders, or changes those of their ids. */
export function keepFolders(kept: readonly Folder[]): void {
  show([...new Map([...folders.peek(), ...kept].map((one) => [one.id, one])).values()]);
  for (const folder of kept) storage().putRecord("folders", folder).then(() => tell(), unsaved);
}

/** Deletes a folder; its conversations stay. */
export function deleteFolder(id: string): void {
  for (const one of conversations.peek()) if (one.folder === id) organize(one.id, { folder: null });
  folders.value = folders.peek().filter((one) => one.id !== id);
  storage().deleteRecord("folders", id).then(() => tell(), unsaved);
}
