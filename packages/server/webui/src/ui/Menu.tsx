// SPDX-License-Identifier: MIT
// A button with a menu above everything else. Arrow keys, Home and End move in it; Escape, Tab or a click elsewhere close it.

import { useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon, type IconName } from "./Icon.tsx";

export interface MenuItem {
  icon: IconName;
  label: string;
  key?: string; // where labels may be the same
  run: () => void;
}

export function Menu({ label, icon = "more", items }: { label: string; icon?: IconName; items: readonly MenuItem[] }) {
  const [isOpen, setOpen] = useState(false);
  const opener = useRef<HTMLButtonElement>(null);
  const id = useId();
  const close = () => {
    setOpen(false);
    opener.current?.focus({ preventScroll: true });
  };
  return (
    <span class="menu-frame">
      <button ref={opener} type="button" class="icon-button" aria-label={label} data-tip={label} aria-haspopup="menu" aria-expanded={isOpen}
        aria-controls={isOpen ? id : undefined} onClick={() => setOpen(!isOpen)}>
        <Icon name={icon} />
      </button>
      {isOpen && <List id={id} label={label} items={items} opener={opener.current} onClose={close} onLeave={() => setOpen(false)} />}
    </span>
  );
}

interface ListProps {
  id: string;
  label: string;
  items: readonly MenuItem[];
  opener: HTMLElement | null;
  onClose: () => void; // back to the button
  onLeave: () => void; // to something else
}

function List({ id, label, items, opener, onClose, onLeave }: ListProps) {
  const frame = useRef<HTMLDivElement>(null);
  const placed = useRef<DOMRect | null>(null);
  useLayoutEffect(() => {
    const menu = frame.current;
    if (!menu || !opener) return;
    menu.showPopover();
    place(menu, (placed.current = opener.getBoundingClientRect()));
    menu.querySelector("button")?.focus({ preventScroll: true });
  }, []);
  useLayoutEffect(() => {
    const outside = (event: Event) => {
      if (!frame.current?.contains(event.target as Node) && !opener?.contains(event.target as Node)) onLeave();
    };
    const movedAway = () => {
      const [was, is] = [placed.current, opener?.getBoundingClientRect()];
      if (was?.top !== is?.top || was?.left !== is?.left) onClose(); // else it is told of a scroll from before it opened
    };
    addEventListener("pointerdown", outside);
    addEventListener("scroll", movedAway, { capture: true, passive: true });
    addEventListener("resize", onClose);
    return () => {
      removeEventListener("pointerdown", outside);
      removeEventListener("scroll", movedAway, { capture: true });
      removeEventListener("resize", onClose);
    };
  }, []);
  const onKey = (event: KeyboardEvent) => {
    const all = [...(frame.current?.querySelectorAll("button") ?? [])];
    const at = all.findIndex((one) => one === document.activeElement);
    const wanted = { ArrowDown: (at + 1) % all.length, ArrowUp: (at + all.length - 1) % all.length, Home: 0, End: all.length - 1 }[event.key];
    if (wanted !== undefined) all[wanted]?.focus();
    else if (event.key === "Escape" || event.key === "Tab") onClose();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return (
    <div ref={frame} id={id} class="action-menu" role="menu" aria-label={label} popover="manual" onKeyDown={onKey}>
      {items.map(({ icon, label: name, key = name, run }) => (
        <button key={key} type="button" role="menuitem" tabIndex={-1} class="nav-item" onClick={() => { onClose(); run(); }}>
          <Icon name={icon} /><span>{name}</span>
        </button>
      ))}
    </div>
  );
}

const GAP = 4;

/** Below its button, or above it where there is no room; never outside of the window. */
function place(menu: HTMLElement, button: DOMRect): void {
  const { offsetWidth: width, offsetHeight: height } = menu;
  const below = button.bottom + GAP;
  const top = below + height < innerHeight ? below : Math.max(GAP, button.top - GAP - height);
  menu.style.top = `${top}px`;
  menu.style.left = `${Math.max(GAP, Math.min(button.left, innerWidth - width - GAP))}px`;
}
