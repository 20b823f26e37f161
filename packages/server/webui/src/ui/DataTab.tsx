// SPDX-License-Identifier: MIT
// Export, import, and deletion of all conversations.

import { useRef, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { conversations, current } from "../state/chats.ts";
import { confirmFirst, open } from "../state/dialogs.ts";
import { deleteAll, exportChats, importChats } from "../state/exchange.ts";
import { folders } from "../state/folders.ts";
import { prompts } from "../state/prompts.ts";
import { ImportError, MAX_IMPORT_BYTES } from "../store/transfer.ts";
import { download } from "./download.ts";

export function DataTab() {
  const [said, say] = useState<Said>({ text: "" });
  const file = useRef<HTMLInputElement>(null);
  const chat = current.value?.info.value;
  const read = async () => {
    const chosen = file.current?.files?.[0];
    if (!chosen) return;
    say(await importFile(chosen));
    if (file.current) file.current.value = "";
  };
  const all = conversations.value.length;
  const isEmpty = !all && !prompts.value.length && !folders.value.length;
  return (
    <div class="data">
      <section>
        <h3>{t.value.export}</h3>
        <p class="faint">{t.value.exportText}</p>
        <div class="field-row">
          <button type="button" class="button" disabled={isEmpty} onClick={() => void downloadAll()}>{t.value.exportAll(all)}</button>
          <button type="button" class="button" disabled={!chat} onClick={() => chat && (open.value = { kind: "export", id: chat.id })}>{t.value.exportThis}</button>
        </div>
      </section>
      <section>
        <h3>{t.value.import}</h3>
        <p class="faint">{t.value.importText}</p>
        <input ref={file} id="import-file" class="off-screen" type="file" accept="application/json,.json" aria-label={t.value.import} tabIndex={-1} onChange={() => void read()} />
        <button type="button" class="button" onClick={() => file.current?.click()}>{t.value.chooseFile}</button>
        <p role="status" class={said.isWrong ? "said wrong" : "said"}>{said.text}</p>
      </section>
      <section>
        <h3>{t.value.deleteAll}</h3>
        <p class="faint">{t.value.deleteAllText}</p>
        <button type="button" class="button danger" disabled={isEmpty}
          onClick={() => confirmFirst({ title: t.value.deleteAll, text: t.value.deleteAllSure(all), action: t.value.deleteAll, onConfirm: () => void deleteAll() })}>
          {t.value.deleteAll}
        </button>
      </section>
    </div>
  );
}

interface Said {
  text: string;
  isWrong?: boolean;
}

async function importFile(file: File): Promise<Said> {
  if (file.size > MAX_IMPORT_BYTES) return { text: t.value.fileTooLarge(file.name), isWrong: true };
  try {
    const count = await importChats(await file.text());
    return { text: t.value.imported(count), isWrong: count.broken > 0 };
  } catch (error) {
    return { text: error instanceof ImportError ? t.value.notAnExport(file.name) : t.value.notSaved, isWrong: true };
  }
}

async function downloadAll(): Promise<void> {
  download(await exportChats(conversations.peek().map((one) => one.id), true), "conversations", "json");
}
