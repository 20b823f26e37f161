// SPDX-License-Identifier: MIT
// The sheet of keyboard shortcuts.

import { t } from "../i18n/index.ts";
import { close } from "../state/dialogs.ts";
import { Dialog } from "./Dialog.tsx";

const KEYS = [
  ["send", "Enter"],
  ["newLine", "Shift + Enter"],
  ["stopKey", "Esc"],
  ["editLast", "↑"],
  ["promptKey", "/"],
  ["searchKey", "Ctrl + K"],
  ["newChatKey", "Ctrl + Shift + O"],
  ["sidebarKey", "Ctrl + B"],
  ["settingsKey", "Ctrl + ,"],
  ["sheetKey", "?"],
] as const;

export function ShortcutSheet() {
  return (
    <Dialog title={t.value.shortcuts} onClose={close}>
      <dl class="shortcuts">
        {KEYS.map(([name, keys]) => (
          <div key={name}>
            <dt>{t.value.keys[name]}</dt>
            <dd>{keys.split(" + ").map((key) => <kbd key={key}>{key}</kbd>)}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}
