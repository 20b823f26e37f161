// SPDX-License-Identifier: MIT
// The conversations, and the ways to the other pages.

import { useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { isSidebarOver, open } from "../state/dialogs.ts";
import { mcpServers } from "../state/mcp.ts";
import { prefer, preferences } from "../state/preferences.ts";
import { hashOf, type Route, route } from "../state/route.ts";
import { ConversationList, follow } from "./ConversationList.tsx";
import { Icon, type IconName } from "./Icon.tsx";
import { isComposing } from "./shortcuts.ts";

export function Sidebar() {
  const shown = preferences.value.sidebar;
  const over = isSidebarOver.value;
  const [query, setQuery] = useState("");
  return (
    <>
      {over && <div class="scrim" onClick={() => (isSidebarOver.value = false)} />}
      <nav class={`sidebar${shown ? "" : " hidden"}${over ? " over" : ""}`} aria-label={t.value.conversations}>
        <header class="sidebar-head">
          <span class="brand"><img src="icon.svg" alt="" width="24" height="24" />candle-vllm</span>
          <button type="button" class="icon-button" aria-label={t.value.hideSidebar} data-tip={t.value.hideSidebar}
            onClick={() => (over ? (isSidebarOver.value = false) : prefer({ sidebar: false }))}>
            <Icon name={over ? "close" : "sidebar"} />
          </button>
        </header>
        <div class="sidebar-new">
          <a class="button new-chat" href={hashOf({ page: "chat", id: null })} onClick={follow({ page: "chat", id: null })}>
            <Icon name="plus" />{t.value.newChat}
          </a>
          <button type="button" class="icon-button" aria-label={t.value.newFolder} data-tip={t.value.newFolder} onClick={() => (open.value = { kind: "move", id: null })}>
            <Icon name="folderPlus" />
          </button>
        </div>
        <label class="search">
          <Icon name="search" />
          <input id="search" type="search" placeholder={t.value.search} aria-label={t.value.search} value={query}
            onInput={(event) => setQuery(event.currentTarget.value)}
            onKeyDown={(event) => event.key === "Escape" && !isComposing(event) && (event.preventDefault(), setQuery(""), event.currentTarget.blur())} />
        </label>
        <ConversationList query={query.trim()} />
        <footer class="sidebar-foot">
          {mcpServers.value && <PageLink icon="tool" label={t.value.tools} to={{ page: "tools" }} />}
          <PageLink icon="box" label={t.value.models} to={{ page: "models" }} />
          <PageLink icon="chart" label={t.value.server} to={{ page: "server" }} />
          <button type="button" class="nav-item" onClick={() => (open.value = { kind: "prompts" })}>
            <Icon name="prompt" />{t.value.prompts}
          </button>
          <button type="button" class="nav-item" onClick={() => (open.value = { kind: "settings", tab: "general" })}>
            <Icon name="settings" />{t.value.settings}
          </button>
          <button type="button" class="nav-item" onClick={() => (open.value = { kind: "shortcuts" })}>
            <Icon name="keyboard" />{t.value.shortcuts}
          </button>
        </footer>
      </nav>
    </>
  );
}

function PageLink({ icon, label, to }: { icon: IconName; label: string; to: Route }) {
  const isCurrent = route.value.page === to.page;
  return (
    <a class="nav-item" href={hashOf(to)} aria-current={isCurrent ? "page" : undefined} onClick={follow(to)}>
      <Icon name={icon} />{label}
    </a>
  );
}
