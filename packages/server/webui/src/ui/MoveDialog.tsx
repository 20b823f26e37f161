// SPDX-License-Identifier: MIT
// Puts a conversation into a folder; without one, makes a folder.

import { useId, useRef } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { conversations, organize } from "../state/chats.ts";
import { close } from "../state/dialogs.ts";
import { addFolder, folders } from "../state/folders.ts";
import { MAX_NAME } from "../store/records.ts";
import { Dialog } from "./Dialog.tsx";
import { Icon } from "./Icon.tsx";

export function MoveDialog({ id }: { id: string | null }) {
  const field = useRef<HTMLInputElement>(null);
  const name = useId();
  const chat = conversations.value.find((one) => one.id === id);
  const move = (folder: string | null) => {
    if (chat) organize(chat.id, { folder });
    close();
  };
  const make = (event: Event) => {
    event.preventDefault();
    const wanted = field.current?.value.trim();
    if (wanted) move(addFolder(wanted));
  };
  return (
    <Dialog title={chat ? t.value.moveTitle(chat.title) : t.value.newFolder} onClose={close}>
      {chat && (
        <ul class="choices">
          {[{ id: null, name: t.value.noFolder }, ...folders.value].map((one) => (
            <li key={one.id}>
              <button type="button" class="nav-item" aria-pressed={chat.folder === one.id} onClick={() => move(one.id)}>
                <Icon name={one.id ? "folder" : "close"} /><span>{one.name}</span>{chat.folder === one.id && <Icon name="check" />}
              </button>
            </li>
          ))}
        </ul>
      )}
      <form class="field" onSubmit={make}>
        <label for={name}>{chat ? t.value.newFolder : t.value.folderName}</label>
        <div class="field-row">
          <input ref={field} id={name} class="input" maxLength={MAX_NAME} autocomplete="off" autofocus={!chat} />
          <button type="submit" class="button">{t.value.create}</button>
        </div>
      </form>
    </Dialog>
  );
}
