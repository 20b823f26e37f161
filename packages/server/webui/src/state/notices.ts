// SPDX-License-Identifier: MIT
// Banners above the page, and what is said to screen readers.

import { signal } from "@preact/signals";

export interface Notice {
  id: number;
  kind: "error" | "info";
  text: string;
  retry?: () => void;
  about?: string; // a later one about the same takes its place
}

export const notices = signal<readonly Notice[]>([]);
export const announcement = signal("");

let last = 0;
const MAX_NOTICES = 3;

export function notify(kind: Notice["kind"], text: string, retry?: () => void): void {
  const notice: Notice = retry ? { id: ++last, kind, text, retry } : { id: ++last, kind, text };
  const others = notices.value.filter((one) => one.text !== text);
  notices.value = [...others, notice].slice(-MAX_NOTICES);
}

/** An error of a kind of which only the last one counts. */
export function notifyAbout(about: string, text: string): void {
  forgetAbout(about);
  notices.value = [...notices.value, { id: ++last, kind: "error" as const, text, about }].slice(-MAX_NOTICES);
}

export function forgetAbout(about: string): void {
  notices.value = notices.value.filter((one) => one.about !== about);
}

export function dismiss(id: number): void {
  notices.value = notices.value.filter((one) => one.id !== id);
}

export function announce(text: string): void {
  announcement.value = announcement.value === text ? `${text}\u00a0` : text;
}
