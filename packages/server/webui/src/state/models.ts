// SPDX-License-Identifier: MIT
// The models of the server and which of them is chosen; whether the server is there, asked again and again.

import { computed, signal } from "@preact/signals";
import { ApiError, errorInfo, type ErrorInfo } from "../api/http.ts";
import { listFailures, listModels, loadModel, unloadModel } from "../api/server.ts";
import { isSameModel } from "../api/readers.ts";
import type { ModelCard } from "../api/types.ts";
import { t } from "../i18n/index.ts";
import { announce, notify } from "./notices.ts";
import { apiKey, preferences } from "./preferences.ts";

export type Connection = "connecting" | "ready" | "unreachable" | "locked";

export const models = signal<readonly ModelCard[]>([]);
export const connection = signal<Connection>("connecting");
export const connectionError = signal<ErrorInfo | null>(null);

/** Whether the key that was sent is what the server does not accept. */
export const isKeyWrong = signal(false);

/** Rises when a server answers that was not there before, or is another one: what else it said is old then. */
export const arrivals = signal(0);

/** What is being done to a model by this page, by its id. */
export const working = signal<Readonly<Record<string, "loading" | "unloading">>>({});

/** Why models could not be loaded, as the server tells it to who may know. */
export const failures = signal<Readonly<Record<string, string>>>({});

const LOADING = new Set(["waiting", "loading"]);
const BUSY = new Set([...LOADING, "draining", "unloading"]);
const BUSY_MS = 1000; // while something changes
const CALM_MS = 5000; // a server that has gone, or was started again, is noticed within so long
const LOCKED_MS = 15_000;
const HIDDEN_MS = 30_000; // nobody looks; what the page shows is asked for at once when it is seen again
const RETRY_MS = 1000; // while the server cannot be reached: doubled up to CALM_MS
const SOON_MS = 150; // for the server to begin what it was asked

let polling: ReturnType<typeof setTimeout> | undefined;
let asked = 0;
let misses = 0; // in a row

export const defaultModel = computed<ModelCard | undefined>(
  () => models.value.find((card) => card.default) ?? models.value[0],
);

/** The model by name, else the preferred one, else the server's default. */
export function cardFor(name: string | null): ModelCard | undefined {
  const named = (id: string | null) => models.value.find((card) => card.id === id);
  return named(name) ?? named(preferences.value.model) ?? defaultModel.value;
}

/** Of the cards of one model, which is called several names, the first; an adapter's is its own. */
export const firstOf = (card: ModelCard): ModelCard => models.value.find((one) => isSameModel(one, card)) ?? card;

export const statusOf = (card: ModelCard): string =>
  connection.value === "unreachable" ? "away" : (working.value[card.id] ?? card.status); // nobody knows while the server is gone
export const isLoading = (card: ModelCard): boolean => LOADING.has(statusOf(card));
export const isBusy = (card: ModelCard): boolean => BUSY.has(statusOf(card));

/** Asks for the models, and so whether the server is there; from then on again and again, and sooner while it works. */
export async function refreshModels(): Promise<void> {
  clearTimeout(polling);
  const mine = ++asked;
  const { key } = apiKey.peek();
  try {
    const listed = await listModels();
    if (mine !== asked) return; // somebody has asked later, with another key perhaps
    misses = 0;
    take(listed);
    arrive();
  } catch (error) {
    if (mine !== asked) return;
    const status = error instanceof ApiError ? error.info.status : undefined;
    connection.value = status === 401 || status === 403 ? "locked" : "unreachable";
    connectionError.value = errorInfo(error);
    isKeyWrong.value = status === 401 && key !== "";
    if (connection.value === "unreachable") misses++;
  }
  again(pause());
}

/** Asks at once when the page is seen again, or the machine has a network again. */
export function watchServer(): void {
  const ask = () => void (document.hidden || refreshModels());
  document.addEventListener("visibilitychange", ask);
  for (const name of ["online", "offline"]) addEventListener(name, ask);
  addEventListener("pageshow", ({ persisted }) => persisted && ask()); // the browser had kept the page aside
  ask();
}

function arrive(): void {
  if (connection.value === "unreachable") announce(t.value.reconnected);
  if (connection.value !== "ready") arrivals.value++;
  connection.value = "ready";
  isKeyWrong.value = false;
  connectionError.value = null;
}

/** Asks a little later: a request is on its way that makes the server load a model. */
export function refreshSoon(): void {
  again(SOON_MS);
}

function again(ms: number): void {
  clearTimeout(polling);
  polling = setTimeout(() => void refreshModels(), ms);
}

function pause(): number {
  if (document.hidden) return HIDDEN_MS;
  if (connection.value === "unreachable") return Math.min(CALM_MS, RETRY_MS * 2 ** (misses - 1));
  if (connection.value === "locked") return LOCKED_MS;
  return models.value.some(isBusy) ? BUSY_MS : CALM_MS;
}

function take(listed: readonly ModelCard[]): void {
  if (JSON.stringify(listed) === JSON.stringify(models.value)) return; // nothing need be drawn again
  for (const card of listed.filter(({ parent }) => parent === undefined)) {
    const before = models.value.find((one) => one.id === card.id);
    if (before && before.status !== card.status) sayChange(card);
  }
  const isOther = models.value.length > 0 && names(listed) !== names(models.value);
  const hasLost = models.value.some(({ id, parent }) => parent === undefined && !listed.some((card) => card.id === id)); // one more is no surprise
  models.value = listed;
  if (isOther) arrivals.value++;
  if (hasLost && defaultModel.value) notify("info", t.value.otherModels(defaultModel.value.id));
  if (listed.some(({ status }) => status === "failed")) void refreshFailures();
}

async function refreshFailures(): Promise<void> {
  try {
    failures.value = await listFailures();
  } catch {
    failures.value = {}; // the kind of each failure is known all the same
  }
}

/** A model that this page has removed: that it is gone is no news. */
export async function forgetModel(card: ModelCard): Promise<void> {
  models.value = models.value.filter((one) => one.id !== card.id && !isSameModel(one, card));
  await refreshModels();
}

/** Of models alone: adapters come as they are asked for. */
const names = (cards: readonly ModelCard[]): string =>
  cards.filter(({ parent }) => parent === undefined).map(({ id }) => id).sort().join("\n");

function sayChange({ id, status }: ModelCard): void {
  if (status === "loading" || status === "ready" || status === "failed") announce(`${id}: ${t.value.modelStates[status]}`);
}

export async function changeModel(id: string, work: "loading" | "unloading"): Promise<void> {
  working.value = { ...working.value, [id]: work };
  const done = work === "loading" ? loadModel(id) : unloadModel(id);
  refreshSoon();
  try {
    await done;
  } finally {
    const { [id]: _, ...others } = working.value;
    working.value = others;
    await refreshModels();
  }
}
