// SPDX-License-Identifier: MIT
// Which dialog is open.

import { signal } from "@preact/signals";

export interface Question {
  title: string;
  text: string;
  action: string;
  onConfirm: () => void;
  back?: Open; // what is shown afterwards
}

export type SettingsTab = "chat" | "general" | "access" | "data";

export type Open =
  | { kind: "settings"; tab: SettingsTab }
  | { kind: "shortcuts" }
  | { kind: "prompts" }
  | { kind: "export"; id: string }
  | { kind: "move"; id: string | null } // a conversation into a folder, or none into a new one
  | { kind: "confirm"; question: Question };

export const open = signal<Open | null>(null);
export const isSidebarOver = signal(false); // on narrow screens, where it lies over the page

export const close = (): void => {
  open.value = null;
};

export const confirmFirst = (question: Question): void => {
  open.value = { kind: "confirm", question };
};
