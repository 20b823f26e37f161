// SPDX-License-Identifier: MIT
// What the server's models take, which can be fetched, and what is being fetched; asked for while somebody looks.

import { signal } from "@preact/signals";
import { errorInfo, type ErrorInfo } from "../api/http.ts";
import { deleteModel, pullModel, showModel, stopPull, takeStock } from "../api/server.ts";
import type { Inventory, ModelCard } from "../api/types.ts";
import { t } from "../i18n/index.ts";
import { forgetModel, models, refreshModels } from "./models.ts";
import { announce } from "./notices.ts";

export const inventory = signal<Inventory | null>(null);

/** Why it is not known: it is for operators. */
export const inventoryError = signal<ErrorInfo | null>(null);

/** What the files of models say that are not loaded, by their ids; null where the server cannot serve them. */
export const described = signal<Readonly<Record<string, Partial<ModelCard> | null>>>({});

const BUSY_MS = 1000;
const CALM_MS = 5000;
const UNUSABLE = "model_unusable"; // the server's code
export const ENDED = new Set(["stopped", "failed"]);

let polling: ReturnType<typeof setTimeout> | undefined;
let isWatched = false;
let asked = 0;

/** Asks again and again, until the function that it gives is called. */
export function watchInventory(): () => void {
  isWatched = true;
  void refreshInventory();
  return () => {
    isWatched = false;
    clearTimeout(polling);
  };
}

export async function refreshInventory(): Promise<void> {
  clearTimeout(polling);
  const mine = ++asked;
  try {
    if (!document.hidden) {
      const taken = await takeStock();
      if (mine !== asked) return;
      await take(taken);
    }
    inventoryError.value = null;
  } catch (error) {
    if (mine !== asked) return;
    inventory.value = null;
    inventoryError.value = errorInfo(error);
  }
  const isBusy = inventory.value?.pulls.some(({ state }) => !ENDED.has(state));
  if (isWatched && mine === asked) polling = setTimeout(() => void refreshInventory(), isBusy ? BUSY_MS : CALM_MS);
}

async function take(taken: Inventory): Promise<void> {
  const before = inventory.value?.pulls ?? [];
  const isHere = (name: string) => taken.models.some(({ id }) => id === name);
  const fetched = before.filter(({ model }) => isHere(model) && !taken.pulls.some((pull) => pull.model === model));
  const failed = taken.pulls.filter(({ model, state }) => state === "failed" && before.some((pull) => pull.model === model && pull.state !== state));
  if (fetched.length || taken.models.some(({ id }) => !models.value.some((card) => card.id === id))) await refreshModels();
  inventory.value = taken;
  for (const { model } of fetched) announce(t.value.fetched(model));
  for (const { model } of failed) announce(`${model}: ${t.value.pullStates.failed}`);
  void describeNext();
}

let isDescribing = false;

/** Asks what is known of models that are not loaded, one after the other, each once. */
async function describeNext(): Promise<void> {
  if (isDescribing) return;
  isDescribing = true;
  try {
    for (const { id, size } of inventory.value?.models ?? []) {
      if (!size || id in described.value || models.value.some((card) => card.id === id && card.architecture)) continue;
      const shown = await showModel(id).catch((error: unknown) => {
        const { code, status = 0 } = errorInfo(error);
        if (code === UNUSABLE) return null;
        if (status >= 500 || status === 404) return undefined; // is asked again; the others are told nevertheless
        throw error;
      });
      if (shown !== undefined) described.value = { ...described.value, [id]: shown };
    }
  } catch {
    // the rows say what they can without it
  } finally {
    isDescribing = false;
  }
}

/** Where what had the focus has gone, the page has it. */
function refocus(): void {
  requestAnimationFrame(() => {
    if (document.activeElement === document.body) document.getElementById("main")?.focus();
  });
}

/** Fetches a model by its name on Hugging Face or in the list. */
export async function fetchModel(name: string): Promise<void> {
  await pullModel(name);
  await refreshInventory();
  refocus();
}

export async function stopFetching(name: string, remove = false): Promise<void> {
  await stopPull(name, remove);
  await refreshInventory();
  refocus();
}

export async function removeModel(card: ModelCard): Promise<void> {
  await deleteModel(card.id);
  const { [card.id]: _, ...others } = described.value;
  described.value = others;
  await forgetModel(card);
  await refreshInventory();
  refocus();
}
