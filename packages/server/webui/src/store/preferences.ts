// SPDX-License-Identifier: MIT
// Small things that stay in the browser: theme, language, general settings, tools. In localStorage, as JSON.

import type { AlwaysAllowed } from "../chat/approval.ts";
import { readSettings } from "../chat/settings.ts";
import type { ChatSettings } from "../chat/types.ts";

export type Theme = "system" | "light" | "dark";

export interface Preferences {
  theme: Theme;
  language: string | null; // null: the browser's
  settings: ChatSettings;
  model: string | null;
  allowed: AlwaysAllowed;
  toolsOff: readonly string[];
  sidebar: boolean;
  titles: boolean; // conversations are named by the model
}

export const KEY = "candle-vllm.preferences";
export const API_KEY = "candle-vllm.key";

export function readPreferences(): Preferences {
  const given = fromJson(read("localStorage", KEY));
  const theme = (["light", "dark"] as const).find((one) => one === given.theme) ?? "system";
  const allowed = typeof given.allowed === "object" && given.allowed !== null ? given.allowed : {};
  return {
    theme,
    language: typeof given.language === "string" ? given.language : null,
    settings: readSettings(given.settings),
    model: typeof given.model === "string" ? given.model : null,
    allowed: Object.fromEntries(Object.entries(allowed).filter(([, print]) => typeof print === "string")),
    toolsOff: Array.isArray(given.toolsOff) ? given.toolsOff.filter((one) => typeof one === "string") : [],
    sidebar: given.sidebar !== false,
    titles: given.titles !== false,
  };
}

export const writePreferences = (preferences: Preferences): void =>
  write("localStorage", KEY, JSON.stringify(preferences));

/** The API key: kept for the tab, or on this device where the user said so. */
export function readKey(): { key: string; remembered: boolean } {
  const remembered = read("localStorage", API_KEY);
  return remembered ? { key: remembered, remembered: true } : { key: read("sessionStorage", API_KEY) ?? "", remembered: false };
}

export function writeKey(key: string, remember: boolean): void {
  write("localStorage", API_KEY, remember ? key : "");
  write("sessionStorage", API_KEY, remember ? "" : key);
}

const PAGE_KEY = "candle-vllm.page-key";

/** The key of the address that the server printed; it stays with the tab. */
export const readPageKey = (): string => read("sessionStorage", PAGE_KEY) ?? "";
export const writePageKey = (key: string): void => write("sessionStorage", PAGE_KEY, key);

/** What is typed and not sent, by conversation; "" is the new one. It stays with the tab. */
export const readDraft = (conversation: string): string => read("sessionStorage", `candle-vllm.draft.${conversation}`) ?? "";
export const writeDraft = (conversation: string, text: string): void =>
  write("sessionStorage", `candle-vllm.draft.${conversation}`, text);

const UNFINISHED = "candle-vllm.unfinished";

/** What the tab's last page was writing to the database when it went away, as JSON. */
export const readUnfinished = (): string => read("sessionStorage", UNFINISHED) ?? "";
export const writeUnfinished = (records: string): void => write("sessionStorage", UNFINISHED, records);

// Storage can be forbidden, so that its name alone throws, or full; nothing here is worth a failure.
type StorageName = "localStorage" | "sessionStorage";

function read(storage: StorageName, key: string): string | null {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return null;
  }
}

function write(storage: StorageName, key: string, value: string): void {
  try {
    if (value) globalThis[storage].setItem(key, value);
    else globalThis[storage].removeItem(key);
  } catch {
    // see above
  }
}

function fromJson(text: string | null): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text ?? "{}");
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : {};
  } catch {
    return {};
  }
}
