// SPDX-License-Identifier: MIT
// One conversation as a file: all of it for another browser, or what is shown as Markdown.

import { useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { conversations } from "../state/chats.ts";
import { close } from "../state/dialogs.ts";
import { exportChats, exportMarkdown } from "../state/exchange.ts";
import { unsaved } from "../state/storage.ts";
import { Dialog } from "./Dialog.tsx";
import { download } from "./download.ts";

const FORMATS = ["md", "json"] as const;

export function ExportDialog({ id }: { id: string }) {
  const [format, setFormat] = useState<(typeof FORMATS)[number]>("md");
  const [thoughts, setThoughts] = useState(true);
  const chat = conversations.value.find((one) => one.id === id);
  if (!chat) return null;
  const save = (event: Event) => {
    event.preventDefault();
    close();
    const made = format === "md" ? exportMarkdown(chat, thoughts) : exportChats([id]);
    made.then((text) => download(text, chat.title, format), unsaved);
  };
  return (
    <Dialog title={t.value.exportOf(chat.title)} onClose={close}>
      <form class="fields" onSubmit={save}>
        <fieldset class="fields">
          <legend class="off-screen">{t.value.fileFormat}</legend>
          {FORMATS.map((one) => (
            <label key={one} class="check">
              <input type="radio" name="format" checked={format === one} onChange={() => setFormat(one)} />
              <span>{t.value.formats[one]}<br /><span class="hint">{t.value.formatHints[one]}</span></span>
            </label>
          ))}
        </fieldset>
        <label class="check">
          <input type="checkbox" checked={thoughts} disabled={format !== "md"} onChange={(event) => setThoughts(event.currentTarget.checked)} />
          {t.value.withThoughts}
        </label>
        <footer class="dialog-actions">
          <button type="button" class="button" onClick={close}>{t.value.cancel}</button>
          <button type="submit" class="button primary">{t.value.download}</button>
        </footer>
      </form>
    </Dialog>
  );
}
