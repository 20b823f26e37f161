// SPDX-License-Identifier: MIT
// The library of prompts.

import { signal } from "@preact/signals";
import type { Prompt } from "../chat/types.ts";
import { readPrompt } from "../store/records.ts";
import { storage, unsaved } from "./storage.ts";
import { tell } from "./tabs.ts";

/** By name. */
export const prompts = signal<readonly Prompt[]>([]);

export async function readPrompts(): Promise<void> {
  show((await storage().records("prompts")).flatMap(readPrompt));
}

const show = (all: readonly Prompt[]): void => {
  prompts.value = [...all].sort((a, b) => a.name.localeCompare(b.name) || a.updated - b.updated);
};

/** Adds prompts, or changes those of their ids. */
export function keepPrompts(kept: readonly Prompt[]): void {
  show([...new Map([...prompts.peek(), ...kept].map((one) => [one.id, one])).values()]);
  for (const prompt of kept) storage().putRecord("prompts", prompt).then(() => tell(), unsaved);
}

export function deletePrompt(id: string): void {
  prompts.value = prompts.peek().filter((one) => one.id !== id);
  storage().deleteRecord("prompts", id).then(() => tell(), unsaved);
}

/** Those whose name holds all words of a query. */
export function findPrompts(query: string): readonly Prompt[] {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return prompts.value.filter(({ name }) => words.every((word) => name.toLowerCase().includes(word)));
}
