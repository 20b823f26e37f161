// SPDX-License-Identifier: MIT
// Keys that work anywhere on the page.

import { current } from "../state/chats.ts";
import { isSidebarOver, open } from "../state/dialogs.ts";
import { prefer, preferences } from "../state/preferences.ts";
import { go } from "../state/route.ts";

/** Whether an input method takes the key. In Safari the composition has ended before the key that ends it, whose code is 229. */
export const isComposing = (event: KeyboardEvent): boolean => event.isComposing || event.keyCode === 229;

const NARROW = "(max-width: 760px)";

export const isNarrow = (): boolean => matchMedia(NARROW).matches;

/** Closes the list that lies over the page where it comes to stand beside it: a phone is turned, a window made larger. */
export function closeListWhereWide(): void {
  matchMedia(NARROW).addEventListener("change", () => (isSidebarOver.value = false));
}

/** Shows or hides the list of conversations. */
export function toggleSidebar(): void {
  if (isNarrow()) isSidebarOver.value = !isSidebarOver.value;
  else prefer({ sidebar: !preferences.value.sidebar });
}

function search(): void {
  if (isNarrow()) isSidebarOver.value = true;
  else prefer({ sidebar: true });
  focus("search");
}

/** Focuses an element at once, so that what is typed next goes there; or when it is drawn. */
function focus(id: string): void {
  const found = document.getElementById(id);
  found?.focus();
  if (!found || document.activeElement !== found) {
    requestAnimationFrame(() => requestAnimationFrame(() => document.getElementById(id)?.focus()));
  }
}

/** Where the next message is written, or, where a keyboard would come up for that, the messages. */
export function focusInput(): void {
  const name = matchMedia("(pointer: coarse)").matches ? ".messages-frame" : "#composer";
  document.querySelector<HTMLElement>(name)?.focus({ preventScroll: true });
}

function newChat(): void {
  go({ page: "chat", id: null });
  focus("composer");
}

export function listenForShortcuts(): void {
  addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    const control = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    const isOpen = document.querySelector("dialog[open]") !== null; // also one that the page's state does not know
    const done = (work: () => void) => {
      event.preventDefault();
      work();
    };
    if (control && key === "k" && !isOpen) return done(search);
    if (control && event.shiftKey && key === "o" && !isOpen) return done(newChat);
    if (control && !event.shiftKey && key === "b" && !isOpen) return done(toggleSidebar);
    if (control && key === "," && !isOpen) return done(() => (open.value = { kind: "settings", tab: "general" }));
    if (control && key === "/" && !isOpen) return done(() => (open.value = { kind: "shortcuts" }));
    if (event.key === "?" && !isOpen && !isTyping(event.target)) return done(() => (open.value = { kind: "shortcuts" }));
    if (event.key === "Escape" && !isOpen && !event.defaultPrevented) escape();
    return undefined;
  });
}

function escape(): void {
  if (isSidebarOver.value) isSidebarOver.value = false;
  else if (current.value?.isBusy) current.value.stop();
}

const isTyping = (target: EventTarget | null): boolean =>
  target instanceof HTMLElement && (target.isContentEditable || /^(?:INPUT|TEXTAREA|SELECT)$/.test(target.tagName));

/** A file that is dropped beside the input would be shown by the browser in place of the page. */
export function keepDroppedFilesOut(): void {
  const refuse = (event: DragEvent) => {
    if (event.defaultPrevented || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "none";
  };
  addEventListener("dragover", refuse);
  addEventListener("drop", refuse);
}
