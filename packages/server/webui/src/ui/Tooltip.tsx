// SPDX-License-Identifier: MIT
// Says what a button without words does (its `data-tip`): while the pointer rests on it, or the keyboard has come to it.
// One element for the whole page, in the top layer; Escape hides it.

import { useEffect, useRef } from "preact/hooks";

const REST_MS = 250;
const GAP = 6; // pixels

export function Tooltip() {
  const frame = useRef<HTMLDivElement>(null);
  useEffect(() => follow(frame.current!), []);
  return <div ref={frame} id="tip" class="tip" role="tooltip" popover="manual" />;
}

function follow(tip: HTMLElement): () => void {
  let target: Element | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const changed = new MutationObserver(() => show()); // such as "Copied"
  const hide = () => {
    clearTimeout(timer);
    if (tip.matches(":popover-open")) tip.hidePopover();
  };
  const show = () => {
    const text = target?.getAttribute("data-tip");
    if (!target?.isConnected || !text) return hide();
    tip.textContent = text;
    // What is more than the name is read to those who do not see it.
    if (text !== target.getAttribute("aria-label")) target.setAttribute("aria-describedby", tip.id);
    if (!tip.matches(":popover-open")) tip.showPopover();
    place(tip, target.getBoundingClientRect());
  };
  const leave = () => {
    hide();
    changed.disconnect();
    if (target?.getAttribute("aria-describedby") === tip.id) target.removeAttribute("aria-describedby");
    target = undefined;
  };
  const turnTo = (event: Event, after: number) => {
    const found = (event.target as Element | null)?.closest?.("[data-tip]") ?? undefined;
    if (found === target) return;
    leave();
    target = found;
    if (!target) return;
    changed.observe(target, { attributeFilter: ["data-tip"] });
    timer = setTimeout(show, after);
  };
  const events = new AbortController();
  const on = <K extends keyof DocumentEventMap>(name: K, work: (event: DocumentEventMap[K]) => void) =>
    document.addEventListener(name, work, { signal: events.signal, capture: true, passive: true });
  on("pointerover", (event) => event.pointerType !== "touch" && turnTo(event, REST_MS));
  on("pointerleave", (event) => event.target === document && leave());
  on("focusin", (event) => (event.target as Element).matches(":focus-visible") && turnTo(event, 0));
  on("focusout", leave);
  on("pointerdown", hide);
  on("scroll", hide);
  on("keydown", (event) => event.key === "Escape" && hide());
  return () => {
    events.abort();
    leave();
  };
}

/** Below what it belongs to, or above where there is no room, and always within the window. */
function place(tip: HTMLElement, at: DOMRect): void {
  tip.style.left = "0"; // where it was last it may have less room, and be higher for that
  const { offsetWidth: width, offsetHeight: height } = tip;
  const { clientWidth, clientHeight } = document.documentElement;
  const below = at.bottom + GAP;
  const left = at.left + at.width / 2 - width / 2;
  tip.style.top = `${below + height <= clientHeight ? below : at.top - height - GAP}px`;
  tip.style.left = `${Math.max(GAP, Math.min(left, clientWidth - width - GAP))}px`;
}
