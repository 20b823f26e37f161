// SPDX-License-Identifier: MIT
// The conversation that is shown: head, messages, input.

import { t } from "../i18n/index.ts";
import { current } from "../state/chats.ts";
import { open } from "../state/dialogs.ts";
import { shownStart } from "../state/new-chat.ts";
import { preferences } from "../state/preferences.ts";
import { route } from "../state/route.ts";
import { isStoreReady } from "../state/storage.ts";
import { Composer } from "./Composer.tsx";
import { ContextGauge } from "./ContextGauge.tsx";
import { Icon } from "./Icon.tsx";
import { MessageList } from "./MessageList.tsx";
import { ModelPicker } from "./ModelPicker.tsx";
import { SidebarButton } from "./SidebarButton.tsx";
import { Welcome } from "./Welcome.tsx";

export function ChatPage() {
  const chat = current.value;
  const { page } = route.value;
  const wanted = page === "chat" ? route.value.id : null;
  const isOpening = !isStoreReady.value || (wanted !== null && chat?.info.value.id !== wanted);
  const isOwn = Object.keys(shownStart.value.settings).length > 0;
  const isWider = Object.keys(preferences.value.settings).length > 0;
  const state = isOwn ? t.value.someAreSet : isWider ? t.value.allChatsSet : undefined;
  return (
    <>
      <header class="page-head">
        <SidebarButton />
        <ModelPicker />
        <h1 class="off-screen">{chat?.info.value.title ?? t.value.newChat}</h1>
        <span class="spring" />
        <ContextGauge />
        <button type="button" class="icon-button" aria-label={t.value.chatSettings} aria-description={state} data-tip={state ? `${t.value.chatSettings}: ${state}` : t.value.chatSettings}
          onClick={() => (open.value = { kind: "settings", tab: "chat" })}>
          <Icon name="settings" />
          {(isOwn || isWider) && <span class={isOwn ? "badge-dot" : "badge-dot wider"} />}
        </button>
      </header>
      {chat && !isOpening && chat.path.value.length > 0 ? (
        <MessageList key={chat.info.value.id} chat={chat} />
      ) : (
        <div class="scroller">{!isOpening && <Welcome />}</div>
      )}
      <Composer key={`composer-${chat?.info.value.id ?? ""}`} chat={isOpening ? null : chat} />
    </>
  );
}
