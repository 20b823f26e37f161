// What can be done with any message: go to its siblings, delete it.

import { t } from "../i18n/index.ts";
import { confirmFirst } from "../state/dialogs.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { Icon } from "./Icon.tsx";

export function Siblings({ chat, id }: { chat: OpenChat; id: string }) {
  const all = chat.siblings(id);
  if (all.length < 2) return null;
  const at = all.indexOf(id);
  const step = (by: number) => () => {
    const wanted = all[at + by];
    if (wanted) chat.select(wanted);
  };
  return (
    <span class="siblings" role="group" aria-label={t.value.versions}>
      <button type="button" class="icon-button" aria-label={t.value.previousVersion} title={t.value.previousVersion} disabled={at === 0 || chat.isBusy} onClick={step(-1)}>
        <Icon name="left" />
      </button>
      <span aria-label={t.value.versionOf(at + 1, all.length)}>{at + 1}/{all.length}</span>
      <button type="button" class="icon-button" aria-label={t.value.nextVersion} title={t.value.nextVersion} disabled={at === all.length - 1 || chat.isBusy} onClick={step(1)}>
        <Icon name="right" />
      </button>
    </span>
  );
}

export function removeButton(chat: OpenChat, id: string) {
  const remove = () => {
    const text = chat.hasBelow(id) ? t.value.deleteBranchText : t.value.deleteMessageText;
    confirmFirst({ title: t.value.deleteMessage, text, action: t.value.delete, onConfirm: () => chat.remove(id) });
  };
  return (
    <button type="button" class="icon-button" aria-label={t.value.deleteMessage} title={t.value.deleteMessage} disabled={chat.isBusy} onClick={remove}>
      <Icon name="trash" />
    </button>
  );
}
