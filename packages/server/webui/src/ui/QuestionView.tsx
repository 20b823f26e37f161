// SPDX-License-Identifier: MIT
// What the user said.

import { useState } from "preact/hooks";
import type { UserMessage } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { Dialog } from "./Dialog.tsx";
import { Editor, useEditing } from "./Editor.tsx";
import { FileChip } from "./FileChip.tsx";
import { LongText } from "./LongText.tsx";
import { CopyTool, MessageTools, RemoveTool, Tool } from "./MessageTools.tsx";
import { focusInput } from "./shortcuts.ts";

export function QuestionView({ chat, message, isLast }: { chat: OpenChat; message: UserMessage; isLast: boolean }) {
  const { frame, editing, edit, done } = useEditing(".edit-question");
  const keep = (text: string) => chat.edit(message.id, text);
  if (editing) return <Editor text={message.text} hint={t.value.editHint} action={t.value.sendEdited} isBusy={chat.isBusy} onKeep={keep} onDone={done} />;
  return (
    <article ref={frame} class="question" aria-label={t.value.you}>
      {message.images && <Pictures images={message.images} />}
      {message.files && <div class="files">{message.files.map((file, index) => <FileChip key={index} file={file} />)}</div>}
      {message.text && <LongText class="bubble" text={message.text} />}
      <MessageTools chat={chat} id={message.id} actions={
        <>
          <Tool kind="edit-question" icon="edit" label={t.value.edit} tip={t.value.tips.edit} disabled={chat.isBusy} onClick={edit} />
          <CopyTool text={() => message.text} />
          <RemoveTool chat={chat} id={message.id} />
        </>
      }>
        {isLast && !chat.isBusy && (
          <button type="button" class="button small" onClick={() => { focusInput(); chat.answer(message.id); }}>{t.value.answer}</button>
        )}
      </MessageTools>
    </article>
  );
}

/** Small pictures; one that is chosen is shown whole. */
function Pictures({ images }: { images: readonly string[] }) {
  const [shown, setShown] = useState<string | null>(null);
  return (
    <div class="pictures">
      {images.map((url, index) => (
        <button key={index} type="button" class="picture" aria-label={t.value.showImage(index + 1)} onClick={() => setShown(url)}>
          <img src={url} alt="" />
        </button>
      ))}
      {shown && <Dialog title={t.value.picture} wide onClose={() => setShown(null)}><img class="whole-picture" src={shown} alt={t.value.picture} /></Dialog>}
    </div>
  );
}
