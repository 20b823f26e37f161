// SPDX-License-Identifier: MIT
// What the user prefers, as a signal that is kept; and the API key.

import { effect, signal } from "@preact/signals";
import { useKey } from "../api/http.ts";
import { language } from "../i18n/index.ts";
import { API_KEY, KEY, type Preferences, readKey, readPreferences, writeKey, writePreferences } from "../store/preferences.ts";

export const preferences = signal<Preferences>(readPreferences());
export const apiKey = signal(readKey());

export function prefer(change: Partial<Preferences>): void {
  preferences.value = { ...preferences.value, ...change };
  writePreferences(preferences.value);
}

const UNSENDABLE = /[^\x20-\x7e]/g; // what no header can have, such as spaces of no width beside a key that was copied

export function setKey(key: string, remembered: boolean): void {
  apiKey.value = { key: key.replace(UNSENDABLE, "").trim(), remembered };
  writeKey(apiKey.value.key, remembered);
}

/** Theme and language follow the preferences; what another tab has written counts here too, the API key included. */
export function applyPreferences(): void {
  useKey(() => apiKey.peek().key);
  effect(() => {
    const { theme } = preferences.value;
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  });
  effect(() => {
    language.value = preferences.value.language;
  });
  addEventListener("storage", (event) => {
    if (event.key === KEY || event.key === null) preferences.value = readPreferences();
    if (event.key === API_KEY || event.key === null) apiKey.value = readKey(); // remembered or forgotten in another tab
  });
}
