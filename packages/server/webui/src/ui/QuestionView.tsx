// What the user said.

import { useLayoutEffect, useRef, useState } from "preact/hooks";
import type { UserMessage } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { CopyTool, MessageTools, RemoveTool, Tool } from "./MessageTools.tsx";
import { focusInput } from "./shortcuts.ts";

const SHOWN = 10_000; // characters of a question at first

export function QuestionView({ chat, message, isLast }: { chat: OpenChat; message: UserMessage; isLast: boolean }) {
  const [editing, setEditing] = useState(false);
  const frame = useRef<HTMLElement>(null);
  const leaving = useRef<"input" | "button" | null>(null); // where the focus goes when the editor closes
  useLayoutEffect(() => {
    if (editing || !leaving.current) return;
    const button = leaving.current === "button" && [...frame.current!.querySelectorAll<HTMLElement>(".edit-question, [popovertarget]")].find((one) => one.checkVisibility());
    leaving.current = null;
    if (button) button.focus();
    else focusInput();
  }, [editing]);
  const edit = () => {
    leaving.current = document.activeElement?.id === "composer" ? "input" : "button";
    setEditing(true);
  };
  const done = (isSent: boolean) => {
    if (isSent) {
      leaving.current = null;
      focusInput(); // another branch takes this one's place
    }
    setEditing(false);
  };
  if (editing) return <Editor chat={chat} message={message} onDone={done} />;
  return (
    <article ref={frame} class="question" aria-label={t.value.you}>
      <Bubble text={message.text} />
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

/** Text of any length would take seconds to lay out: a long one is shown by its beginning at first. */
function Bubble({ text }: { text: string }) {
  const [count, setCount] = useState(SHOWN);
  return (
    <div class="bubble">
      {text.length > count ? `${text.slice(0, count)}…` : text}
      {text.length > count && (
        <button type="button" class="button small" onClick={() => setCount(count * 10)}>{t.value.more}</button>
      )}
    </div>
  );
}

function Editor({ chat, message, onDone }: { chat: OpenChat; message: UserMessage; onDone: (isSent: boolean) => void }) {
  const field = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    field.current?.focus();
    field.current?.setSelectionRange(message.text.length, message.text.length);
  }, []);
  const send = () => {
    const text = field.current?.value.trim() ?? "";
    if (!text || chat.isBusy) return;
    onDone(true);
    chat.edit(message.id, text);
  };
  return (
    <div class="editor">
      <textarea ref={field} class="input" rows={Math.min(12, message.text.split("\n").length + 1)} aria-label={t.value.edit} defaultValue={message.text}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            send();
          }
          if (event.key === "Escape") {
            event.preventDefault();
            onDone(false);
          }
        }} />
      <footer class="editor-actions">
        <span class="faint small">{t.value.editHint}</span>
        <button type="button" class="button" onClick={() => onDone(false)}>{t.value.cancel}</button>
        <button type="button" class="button primary" onClick={send}>{t.value.sendEdited}</button>
      </footer>
    </div>
  );
}
