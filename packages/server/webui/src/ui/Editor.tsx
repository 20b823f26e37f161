// SPDX-License-Identifier: MIT
// The field in which a message is changed, and where the focus goes when it closes.

import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { focusInput, isComposing } from "./shortcuts.ts";

/** Whether a message is being edited; the focus comes back to the button of that, or to the message field. */
export function useEditing(button: string) {
  const [editing, setEditing] = useState(false);
  const frame = useRef<HTMLElement>(null);
  const leaving = useRef<"input" | "button" | null>(null); // where the focus goes when the editor closes
  useLayoutEffect(() => {
    if (editing || !leaving.current) return;
    const found = leaving.current === "button" && [...frame.current!.querySelectorAll<HTMLElement>(`${button}, [popovertarget]`)].find((one) => one.checkVisibility());
    leaving.current = null;
    if (found) found.focus();
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
  return { frame, editing, edit, done };
}

interface EditorProps {
  text: string;
  hint: string;
  action: string;
  isBusy: boolean;
  onKeep: (text: string) => void;
  onDone: (isSent: boolean) => void;
}

export function Editor({ text: before, hint, action, isBusy, onKeep, onDone }: EditorProps) {
  const field = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    field.current?.focus();
    field.current?.setSelectionRange(before.length, before.length);
  }, []);
  const send = () => {
    const text = field.current?.value.trim() ?? "";
    if (!text || isBusy) return;
    onDone(true);
    onKeep(text);
  };
  return (
    <div class="editor">
      <textarea ref={field} class="input" dir="auto" rows={Math.min(12, before.split("\n").length + 1)} aria-label={t.value.edit} defaultValue={before}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !isComposing(event) && !matchMedia("(pointer: coarse)").matches) {
            event.preventDefault();
            send();
          }
          if (event.key === "Escape" && !isComposing(event)) {
            event.preventDefault();
            onDone(false);
          }
        }} />
      <footer class="editor-actions">
        <span class="faint small">{hint}</span>
        <button type="button" class="button" onClick={() => onDone(false)}>{t.value.cancel}</button>
        <button type="button" class="button primary" onClick={send}>{action}</button>
      </footer>
    </div>
  );
}
