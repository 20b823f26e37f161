// SPDX-License-Identifier: MIT
// A panel that opens below its button, or above it, and closes at Escape, a click elsewhere, or when the focus leaves.

import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef } from "preact/hooks";

/** A question that the panel asked: it stays open below. */
const isInDialog = (target: EventTarget | null): boolean => target instanceof Element && target.closest("dialog") !== null;

interface PopoverProps {
  label: string; // of the button
  button: ComponentChildren;
  buttonClass: string;
  isOpen: boolean;
  onToggle: (open: boolean) => void;
  above?: boolean;
  children: ComponentChildren;
}

export function Popover({ label, button, buttonClass, isOpen, onToggle, above = false, children }: PopoverProps) {
  const frame = useRef<HTMLDivElement>(null);
  const opener = useRef<HTMLButtonElement>(null);
  const id = useId();
  useLayoutEffect(() => {
    if (!isOpen) return undefined;
    const outside = (event: Event) => {
      if (!frame.current?.contains(event.target as Node) && !isInDialog(event.target)) onToggle(false);
    };
    const escape = (event: KeyboardEvent) => {
      const isHere = event.target === document.body || frame.current?.contains(event.target as Node); // a button that went leaves the focus to the body
      if (event.key !== "Escape" || event.defaultPrevented || !isHere) return;
      event.preventDefault();
      onToggle(false);
      opener.current?.focus();
    };
    addEventListener("pointerdown", outside);
    document.addEventListener("keydown", escape);
    return () => {
      removeEventListener("pointerdown", outside);
      document.removeEventListener("keydown", escape);
    };
  }, [isOpen]);
  return (
    <div ref={frame} class="popover-frame"
      onFocusOut={(event) => event.relatedTarget && !frame.current?.contains(event.relatedTarget as Node) && !isInDialog(event.relatedTarget) && onToggle(false)}>
      <button ref={opener} type="button" class={buttonClass} aria-label={label} aria-expanded={isOpen} aria-controls={id} onClick={() => onToggle(!isOpen)}>
        {button}
      </button>
      <div id={id} class={above ? "popover above" : "popover"} hidden={!isOpen}>{isOpen && children}</div>
    </div>
  );
}
