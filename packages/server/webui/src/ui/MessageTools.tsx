// SPDX-License-Identifier: MIT
// What can be done with a message: icons that say at hovering and focus what they do, and a menu in words on touch screens.

import { signal } from "@preact/signals";
import { type ComponentChildren, createContext } from "preact";
import { useContext, useId, useRef } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { confirmFirst } from "../state/dialogs.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { CopyButton } from "./CopyButton.tsx";
import { Icon, type IconName } from "./Icon.tsx";

const cannotHover = matchMedia("(hover: none)");
const isTouch = signal(cannotHover.matches);
cannotHover.addEventListener("change", () => (isTouch.value = cannotHover.matches));

const InMenu = createContext(false);

interface MessageToolsProps {
  chat: OpenChat;
  id: string;
  actions: ComponentChildren;
  children?: ComponentChildren; // what stands beside them
}

export function MessageTools({ chat, id, actions, children }: MessageToolsProps) {
  return (
    <footer class="message-tools">
      <Siblings chat={chat} id={id} />
      {actions && (isTouch.value ? <Menu><Versions chat={chat} id={id} />{actions}</Menu> : actions)}
      {children}
    </footer>
  );
}

/** In the top layer, for messages cut off what stands out of them. */
function Menu({ children }: { children: ComponentChildren }) {
  const frame = useRef<HTMLDivElement>(null);
  const id = useId();
  const close = (event: Event) => {
    if (!(event.target as Element).closest("[data-stays]")) frame.current?.hidePopover();
  };
  return (
    <>
      <button type="button" class="text-button" popovertarget={id}><Icon name="more" />{t.value.actions}</button>
      <div ref={frame} id={id} class="menu" popover="auto" role="group" aria-label={t.value.actions} onClick={close}>
        <InMenu.Provider value={true}>{children}</InMenu.Provider>
      </div>
    </>
  );
}

interface ToolProps {
  icon: IconName;
  label: string;
  tip?: string; // what is more to say than the label
  disabled?: boolean;
  kind?: string;
  onClick: () => void;
}

export function Tool({ icon, label, tip, disabled = false, kind = "", onClick }: ToolProps) {
  if (useContext(InMenu)) {
    return <button type="button" class={`menu-item ${kind}`} disabled={disabled} onClick={onClick}><Icon name={icon} />{label}</button>;
  }
  return (
    <button type="button" class={`icon-button ${kind}`} aria-label={label} data-tip={tip ?? label} disabled={disabled} onClick={onClick}>
      <Icon name={icon} />
    </button>
  );
}

/** A tool that is on or off, in words everywhere. */
export function Toggle({ label, tip, isOn, onToggle }: { label: string; tip: string; isOn: boolean; onToggle: (on: boolean) => void }) {
  const inMenu = useContext(InMenu);
  return (
    <button type="button" class={inMenu ? "menu-item" : "text-button"} aria-pressed={isOn} data-tip={inMenu ? undefined : tip} onClick={() => onToggle(!isOn)}>
      {inMenu && <Icon name={isOn ? "check" : "code"} />}{label}
    </button>
  );
}

export function CopyTool({ text }: { text: () => string }) {
  return <CopyButton look={useContext(InMenu) ? "row" : "icon"} label={t.value.copyMessage} text={text} />;
}

export function RemoveTool({ chat, id }: { chat: OpenChat; id: string }) {
  const remove = () => {
    const text = chat.hasBelow(id) ? t.value.deleteBranchText : t.value.deleteMessageText;
    confirmFirst({ title: t.value.deleteMessage, text, action: t.value.delete, onConfirm: () => chat.remove(id) });
  };
  return <Tool icon="trash" label={t.value.deleteMessage} disabled={chat.isBusy} onClick={remove} />;
}

function Siblings({ chat, id }: { chat: OpenChat; id: string }) {
  const all = chat.siblings(id);
  if (all.length < 2) return null;
  const at = all.indexOf(id);
  return (
    <span class="siblings" role="group" aria-label={t.value.versions}>
      <Version chat={chat} to={all[at - 1]} icon="left" label={t.value.previousVersion} />
      <span role="img" aria-label={t.value.versionOf(at + 1, all.length)} data-tip={t.value.versionOf(at + 1, all.length)}>{at + 1}/{all.length}</span>
      <Version chat={chat} to={all[at + 1]} icon="right" label={t.value.nextVersion} />
    </span>
  );
}

function Versions({ chat, id }: { chat: OpenChat; id: string }) {
  const all = chat.siblings(id);
  if (all.length < 2) return null;
  const at = all.indexOf(id);
  return (
    <>
      <Version chat={chat} to={all[at - 1]} icon="left" label={t.value.previousVersion} />
      <Version chat={chat} to={all[at + 1]} icon="right" label={t.value.nextVersion} />
    </>
  );
}

function Version({ chat, to, icon, label }: { chat: OpenChat; to: string | undefined; icon: IconName; label: string }) {
  return <Tool icon={icon} label={label} disabled={!to || chat.isBusy} onClick={() => to && chat.select(to)} />;
}
