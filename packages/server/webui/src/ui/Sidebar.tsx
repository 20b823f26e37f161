// The conversations, and the ways to the other pages.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Conversation } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import { conversations, deleteChat, isStoreReady, rename, searchChats } from "../state/chats.ts";
import { confirmFirst, isSidebarOver, open } from "../state/dialogs.ts";
import { mcpServers } from "../state/mcp.ts";
import { prefer, preferences } from "../state/preferences.ts";
import { go, hashOf, type Route, route } from "../state/route.ts";
import { Icon, type IconName } from "./Icon.tsx";

const PAGE = 100; // conversations that are drawn at first, and each time the end comes into view
const SEARCH_MS = 150;

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
          <button type="button" class="icon-button" aria-label={t.value.hideSidebar} title={t.value.hideSidebar}
            onClick={() => (over ? (isSidebarOver.value = false) : prefer({ sidebar: false }))}>
            <Icon name={over ? "close" : "sidebar"} />
          </button>
        </header>
        <a class="button new-chat" href={hashOf({ page: "chat", id: null })} onClick={follow({ page: "chat", id: null })}>
          <Icon name="plus" />{t.value.newChat}
        </a>
        <label class="search">
          <Icon name="search" />
          <input id="search" type="search" placeholder={t.value.search} aria-label={t.value.search} value={query}
            onInput={(event) => setQuery(event.currentTarget.value)}
            onKeyDown={(event) => event.key === "Escape" && (setQuery(""), event.currentTarget.blur())} />
        </label>
        <ConversationList query={query.trim()} />
        <footer class="sidebar-foot">
          {mcpServers.value && <PageLink icon="tool" label={t.value.tools} to={{ page: "tools" }} />}
          <PageLink icon="chart" label={t.value.server} to={{ page: "server" }} />
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

const follow = (to: Route) => (event: MouseEvent) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  isSidebarOver.value = false;
  go(to);
  if (to.page === "chat" && !to.id) requestAnimationFrame(() => document.getElementById("composer")?.focus());
};

function ConversationList({ query }: { query: string }) {
  const found = useFound(query);
  const [limit, setLimit] = useState(PAGE);
  const end = useRef<HTMLDivElement>(null);
  const all = conversations.value;
  const listed = found ? all.filter((one) => found.has(one.id)) : all;
  const drawn = listed.slice(0, limit);
  useEffect(() => {
    if (!end.current) return undefined;
    const watcher = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && setLimit(limit + PAGE));
    watcher.observe(end.current);
    return () => watcher.disconnect();
  }, [limit, drawn.length < listed.length]);
  if (!listed.length && isStoreReady.value) {
    return <p class="list-empty">{query ? t.value.nothingFound : t.value.noConversations}</p>;
  }
  const shownPeriods = PERIODS.map((name) => ({ name, members: drawn.filter((one) => period(one.updated) === name) }));
  return (
    <div class="conversations">
      {shownPeriods.filter(({ members }) => members.length).map(({ name, members }) => (
        <section key={name}>
          <h2 class="period">{t.value.periods[name]}</h2>
          <ul>{members.map((one) => <Item key={one.id} conversation={one} />)}</ul>
        </section>
      ))}
      {drawn.length < listed.length && <div ref={end} class="list-end" />}
    </div>
  );
}

/** Ids that a search found; undefined while there is nothing to search for. */
function useFound(query: string): ReadonlySet<string> | undefined {
  const [found, setFound] = useState<{ query: string; ids: ReadonlySet<string> }>();
  useEffect(() => {
    if (!query) return undefined;
    const aborter = new AbortController();
    const timer = setTimeout(() => {
      void searchChats(query, aborter.signal).then((ids) => {
        if (!aborter.signal.aborted) setFound({ query, ids: new Set(ids) });
      });
    }, SEARCH_MS);
    return () => {
      aborter.abort();
      clearTimeout(timer);
    };
  }, [query, conversations.value.length]);
  return query ? (found?.ids ?? new Set(conversations.value.map((one) => one.id))) : undefined;
}

const PERIODS = ["today", "yesterday", "week", "earlier"] as const;

function period(time: number): (typeof PERIODS)[number] {
  const today = new Date().setHours(0, 0, 0, 0);
  const day = 86_400_000;
  if (time >= today) return "today";
  if (time >= today - day) return "yesterday";
  return time >= today - 7 * day ? "week" : "earlier";
}

function Item({ conversation }: { conversation: Conversation }) {
  const { id, title } = conversation;
  const [renaming, setRenaming] = useState(false);
  const to: Route = { page: "chat", id };
  const isCurrent = route.value.page === "chat" && route.value.id === id;
  if (renaming) return <li class="conversation"><Rename id={id} title={title} onDone={() => setRenaming(false)} /></li>;
  const remove = () => confirmFirst({
    title: t.value.deleteChat, text: t.value.deleteChatText(title), action: t.value.delete,
    onConfirm: () => void deleteChat(id),
  });
  return (
    <li class="conversation">
      <a class="conversation-link" href={hashOf(to)} aria-current={isCurrent ? "page" : undefined} title={title}
        onClick={follow(to)} onDblClick={() => setRenaming(true)}>
        {title}
      </a>
      <span class="conversation-actions">
        <button type="button" class="icon-button" aria-label={t.value.renameOf(title)} title={t.value.rename} onClick={() => setRenaming(true)}>
          <Icon name="edit" />
        </button>
        <button type="button" class="icon-button" aria-label={t.value.deleteOf(title)} title={t.value.delete} onClick={remove}>
          <Icon name="trash" />
        </button>
      </span>
    </li>
  );
}

function Rename({ id, title, onDone }: { id: string; title: string; onDone: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  useLayoutEffect(() => field.current?.select(), []);
  const keep = () => {
    if (field.current && field.current.value !== title) rename(id, field.current.value);
    onDone();
  };
  return (
    <input ref={field} class="input" defaultValue={title} aria-label={t.value.rename} maxLength={200} onBlur={keep}
      onKeyDown={(event) => {
        if (event.key === "Enter" && !event.isComposing) keep();
        if (event.key === "Escape") {
          event.stopPropagation();
          onDone();
        }
      }} />
  );
}
