// SPDX-License-Identifier: MIT
// Dialogs: the browser's own, which keep the focus inside and close with Escape.

import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { Icon } from "./Icon.tsx";

interface DialogProps {
  title: string;
  onClose: () => void;
  children: ComponentChildren;
  wide?: boolean;
}

export function Dialog({ title, onClose, children, wide = false }: DialogProps) {
  const frame = useRef<HTMLDialogElement>(null);
  const isPressedOutside = useRef(false); // where a selection may end, too
  const id = useId();
  useLayoutEffect(() => { // not a later effect: it would take the focus from what the user has gone to meanwhile
    const focused = document.activeElement;
    const dialog = frame.current;
    dialog?.showModal();
    return () => {
      dialog?.close();
      if (focused instanceof HTMLElement && focused.isConnected) focused.focus();
    };
  }, []);
  const closeOutside = (event: MouseEvent) => {
    if (event.target === frame.current && isPressedOutside.current) onClose();
  };
  return (
    <dialog ref={frame} class={wide ? "dialog wide" : "dialog"} aria-labelledby={id} onClick={closeOutside}
      onPointerDown={(event) => (isPressedOutside.current = event.target === frame.current)}
      onCancel={(event) => { event.preventDefault(); onClose(); }}>
      <div class="dialog-body">
        <header class="dialog-head">
          <h2 id={id}>{title}</h2>
          <button type="button" class="icon-button" aria-label={t.value.close} data-tip={t.value.close} onClick={onClose}>
            <Icon name="close" />
          </button>
        </header>
        {children}
      </div>
    </dialog>
  );
}

interface ConfirmProps {
  title: string;
  text: string;
  action: string;
  onConfirm: () => void;
  onClose: () => void;
}

export function Confirm({ title, text, action, onConfirm, onClose }: ConfirmProps) {
  const confirm = () => {
    onClose();
    onConfirm();
  };
  return (
    <Dialog title={title} onClose={onClose}>
      <p class="dialog-text">{text}</p>
      <footer class="dialog-actions">
        <button type="button" class="button" onClick={onClose}>{t.value.cancel}</button>
        <button type="button" class="button danger" onClick={confirm}>{action}</button>
      </footer>
    </Dialog>
  );
}
