// The models of the server, and which of them is chosen.

import { computed, signal } from "@preact/signals";
import { ApiError, errorInfo, type ErrorInfo } from "../api/http.ts";
import { listModels, loadModel, unloadModel } from "../api/server.ts";
import type { ModelCard } from "../api/types.ts";
import { preferences } from "./preferences.ts";

export type Connection = "connecting" | "ready" | "unreachable" | "locked";

export const models = signal<readonly ModelCard[]>([]);
export const connection = signal<Connection>("connecting");
export const connectionError = signal<ErrorInfo | null>(null);

/** What is being done to a model by this page, by its id. */
export const working = signal<Readonly<Record<string, "loading" | "unloading">>>({});

const BUSY = new Set(["waiting", "loading", "draining"]);
const POLL_MS = 1500;
const RETRY_MS = 5000; // while the server cannot be reached
let polling: ReturnType<typeof setTimeout> | undefined;

export const defaultModel = computed<ModelCard | undefined>(
  () => models.value.find((card) => card.default) ?? models.value[0],
);

/** The model by name, else the preferred one, else the server's default. */
export function cardFor(name: string | null): ModelCard | undefined {
  const named = (id: string | null) => models.value.find((card) => card.id === id);
  return named(name) ?? named(preferences.value.model) ?? defaultModel.value;
}

export async function refreshModels(): Promise<void> {
  clearTimeout(polling);
  try {
    models.value = await listModels();
    connection.value = "ready";
    connectionError.value = null;
  } catch (error) {
    const status = error instanceof ApiError ? error.info.status : undefined;
    connection.value = status === 401 || status === 403 ? "locked" : "unreachable";
    connectionError.value = errorInfo(error);
    if (connection.value === "unreachable") polling = setTimeout(() => void refreshModels(), RETRY_MS);
    return;
  }
  const busy = models.value.some((card) => BUSY.has(card.status)) || Object.keys(working.value).length > 0;
  if (busy) polling = setTimeout(() => void refreshModels(), POLL_MS);
}

export async function changeModel(id: string, work: "loading" | "unloading"): Promise<void> {
  working.value = { ...working.value, [id]: work };
  const done = work === "loading" ? loadModel(id) : unloadModel(id);
  polling = setTimeout(() => void refreshModels(), 100);
  try {
    await done;
  } finally {
    const { [id]: _, ...others } = working.value;
    working.value = others;
    await refreshModels();
  }
}
