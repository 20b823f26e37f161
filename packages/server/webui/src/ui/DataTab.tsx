// Export, import, and deletion of all conversations.

import { useRef, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { conversations, current } from "../state/chats.ts";
import { confirmFirst } from "../state/dialogs.ts";
import { deleteAll, exportChats, importChats } from "../state/exchange.ts";
import { ImportError, MAX_IMPORT_BYTES } from "../store/transfer.ts";

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
  return (
    <div class="data">
      <section>
        <h3>{t.value.export}</h3>
        <p class="faint">{t.value.exportText}</p>
        <div class="field-row">
          <button type="button" class="button" disabled={!all} onClick={() => void download(conversations.value.map((one) => one.id), "conversations")}>{t.value.exportAll(all)}</button>
          <button type="button" class="button" disabled={!chat} onClick={() => chat && void download([chat.id], fileName(chat.title))}>{t.value.exportThis}</button>
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
        <button type="button" class="button danger" disabled={!all}
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

async function download(ids: readonly string[], name: string): Promise<void> {
  const address = URL.createObjectURL(new Blob([await exportChats(ids)], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = `candle-vllm-${name}-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

const fileName = (title: string): string => title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";
