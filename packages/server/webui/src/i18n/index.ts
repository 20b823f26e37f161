// SPDX-License-Identifier: MIT
// The page's texts in the language that is chosen: `t.value.name`.

import { computed, signal } from "@preact/signals";
import { de } from "./de.ts";
import { en, type Texts } from "./en.ts";

export const LANGUAGES: Readonly<Record<string, Texts>> = { en, de };

/** The user's choice; null is what the browser asks for. */
export const language = signal<string | null>(null);

export const shownLanguage = computed<string>(() => {
  if (language.value !== null && Object.hasOwn(LANGUAGES, language.value)) return language.value;
  const wanted = typeof navigator === "undefined" ? ["en"] : navigator.languages;
  return wanted.map((one) => one.slice(0, 2).toLowerCase()).find((one) => Object.hasOwn(LANGUAGES, one)) ?? "en";
});

export const t = computed<Texts>(() => LANGUAGES[shownLanguage.value]!);

/** What a table has under a name that came from elsewhere; nothing of what every object inherits. */
export const named = (table: Readonly<Record<string, string>>, name: string): string | undefined =>
  Object.hasOwn(table, name) ? table[name] : undefined;

/** A number with so many digits behind the point, or with up to `most` where it has them. */
export function formatNumber(value: number, digits = 0, most = digits): string {
  return new Intl.NumberFormat(shownLanguage.value, { maximumFractionDigits: most, minimumFractionDigits: digits }).format(value);
}

/** A large number in short, as 135M. */
export const formatCount = (value: number): string =>
  new Intl.NumberFormat(shownLanguage.value, { notation: "compact", maximumSignificantDigits: 3 }).format(value);

/** The size of a small file. */
export const kibibytes = (bytes: number): string => `${formatNumber(Math.ceil(bytes / 1024))} KiB`;

export function formatBytes(bytes: number): string {
  const mebibytes = bytes / 2 ** 20;
  return mebibytes < 1000 ? `${formatNumber(Math.ceil(mebibytes))} MiB` : `${formatNumber(mebibytes / 1024, 1)} GiB`;
}

export function formatSeconds(seconds: number): string {
  if (seconds < 0.9995) return `${formatNumber(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${formatNumber(seconds, 1)} s`;
  const whole = Math.round(seconds);
  return `${formatNumber(Math.floor(whole / 60))} min ${formatNumber(whole % 60)} s`;
}
