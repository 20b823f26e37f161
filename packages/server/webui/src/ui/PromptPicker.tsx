// SPDX-License-Identifier: MIT
// Prompts at the input: a menu of them, and a list that opens where a message begins with "/".

import { useEffect, useId, useLayoutEffect, useState } from "preact/hooks";
import type { Prompt } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import { confirmFirst, open } from "../state/dialogs.ts";
import { changeChatSettings, shownStart } from "../state/new-chat.ts";
import { announce, notify } from "../state/notices.ts";
import { findPrompts, prompts } from "../state/prompts.ts";
import { Icon, type IconName } from "./Icon.tsx";
import { Menu } from "./Menu.tsx";
import { isComposing } from "./shortcuts.ts";

const iconOf = ({ kind }: Prompt): IconName => (kind === "system" ? "settings" : "prompt");

export function PromptMenu({ onChoose }: { onChoose: (prompt: Prompt) => void }) {
  const items = prompts.value.map((one) => ({ key: one.id, icon: iconOf(one), label: one.name, run: () => onChoose(one) }));
  const edit = { icon: "edit" as const, label: t.value.editPrompts, run: () => (open.value = { kind: "prompts" }) };
  return <Menu label={t.value.prompts} icon="prompt" items={[...items, edit]} />;
}

/** Makes a prompt the system prompt of the chat; asks first where there is another one. */
export function setSystemPrompt({ name, text }: Prompt): void {
  const { settings } = shownStart.peek();
  const change = () => {
    changeChatSettings({ ...shownStart.peek().settings, system: text });
    notify("info", t.value.systemSet(name));
  };
  if (!settings.system?.trim() || settings.system === text) change();
  else confirmFirst({ title: t.value.replaceSystem, text: t.value.replaceSystemText(name), action: t.value.replace, onConfirm: change });
}

/** The list for a message that begins with "/": what it shows, and what its keys do. */
export function useSuggestions(text: string, onChoose: (prompt: Prompt) => void) {
  const [at, setAt] = useState(0);
  const [isDismissed, dismiss] = useState(false);
  const id = useId();
  const found = text.startsWith("/") && !isDismissed ? findPrompts(text.slice(1)) : [];
  const active = Math.min(at, found.length - 1);
  useLayoutEffect(() => { // before the next key
    setAt(0);
    if (!text) dismiss(false);
  }, [text]);
  useEffect(() => {
    if (found.length) announce(t.value.promptsFound(found.length));
  }, [found.length]);
  const choose = (prompt: Prompt) => {
    dismiss(true);
    onChoose(prompt);
  };
  /** Whether a key was for the list. */
  const onKey = (event: KeyboardEvent): boolean => {
    if (!found.length || isComposing(event) || event.shiftKey) return false;
    const to = { ArrowDown: active + 1, ArrowUp: active + found.length - 1 }[event.key];
    if (to !== undefined) {
      setAt(to % found.length);
      document.getElementById(`${id}-${to % found.length}`)?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" || event.key === "Tab") choose(found[active]!);
    else if (event.key === "Escape") dismiss(true);
    else return false;
    event.preventDefault();
    return true;
  };
  const list = found.length > 0 && (
    <ul id={id} class="prompt-list" role="listbox" aria-label={t.value.prompts}>
      {found.map((one, index) => (
        <li key={one.id} id={`${id}-${index}`} class="nav-item" role="option" aria-selected={index === active}
          onMouseDown={(event) => event.preventDefault()} onPointerMove={() => setAt(index)} onClick={() => choose(one)}>
          <Icon name={iconOf(one)} /><span>{one.name}</span><span class="faint">{one.text.slice(0, 120)}</span>
        </li>
      ))}
    </ul>
  );
  const attributes = found.length ? { "aria-controls": id, "aria-activedescendant": `${id}-${active}`, "aria-autocomplete": "list" as const } : {};
  return { list, attributes, onKey };
}
