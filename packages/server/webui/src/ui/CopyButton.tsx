// SPDX-License-Identifier: MIT
// A button that copies a text and says that it did.

import { useEffect, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { Icon } from "./Icon.tsx";

interface CopyProps {
  text: () => string;
  label: string;
  look?: "icon" | "word" | "row"; // a row of a menu has the whole label, a word stands beside the icon elsewhere
}

const CLASSES = { icon: "icon-button", word: "icon-button copy", row: "menu-item" };

export function CopyButton({ text, label, look = "word" }: CopyProps) {
  const [state, setState] = useState<"ready" | "copied" | "failed">("ready");
  useEffect(() => {
    if (state === "ready") return undefined;
    const timer = setTimeout(() => setState("ready"), 2000);
    return () => clearTimeout(timer);
  }, [state]);
  const said = { ready: label, copied: t.value.copied, failed: t.value.copyFailed }[state];
  const copy = async () => setState((await copyText(text())) ? "copied" : "failed");
  return (
    <button type="button" class={CLASSES[look]} data-tip={look === "icon" ? said : undefined} data-stays aria-label={said} onClick={copy}>
      <Icon name={state === "copied" ? "check" : "copy"} />
      {look !== "icon" && <span aria-hidden="true">{state === "ready" && look === "word" ? t.value.copy : said}</span>}
    </button>
  );
}

async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // pages over plain HTTP from another machine have no clipboard
  }
}

function copyBySelection(text: string): boolean {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "off-screen";
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (focused instanceof HTMLElement) focused.focus();
  return copied;
}
