// A panel that opens below its button and closes at Escape, a click elsewhere, or when the focus leaves.

import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";

interface PopoverProps {
  label: string; // of the button
  button: ComponentChildren;
  buttonClass: string;
  isOpen: boolean;
  onToggle: (open: boolean) => void;
  children: ComponentChildren;
}

export function Popover({ label, button, buttonClass, isOpen, onToggle, children }: PopoverProps) {
  const frame = useRef<HTMLDivElement>(null);
  const opener = useRef<HTMLButtonElement>(null);
  const id = useId();
  useEffect(() => {
    if (!isOpen) return undefined;
    const outside = (event: Event) => {
      if (!frame.current?.contains(event.target as Node)) onToggle(false);
    };
    addEventListener("pointerdown", outside);
    return () => removeEventListener("pointerdown", outside);
  }, [isOpen]);
  return (
    <div ref={frame} class="popover-frame"
      onFocusOut={(event) => event.relatedTarget && !frame.current?.contains(event.relatedTarget as Node) && onToggle(false)}
      onKeyDown={(event) => {
        if (event.key !== "Escape" || !isOpen) return;
        event.preventDefault();
        onToggle(false);
        opener.current?.focus();
      }}>
      <button ref={opener} type="button" class={buttonClass} aria-label={label} aria-expanded={isOpen} aria-controls={id} onClick={() => onToggle(!isOpen)}>
        {button}
      </button>
      <div id={id} class="popover" hidden={!isOpen}>{isOpen && children}</div>
    </div>
  );
}
