// SPDX-License-Identifier: MIT
// The list of conversations: those that are pinned, the folders, and the others by their age.

import { useEffect, useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Conversation, Folder } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import { conversations, deleteChat, organize, rename, searchChats } from "../state/chats.ts";
import { confirmFirst, isSidebarOver, open } from "../state/dialogs.ts";
import { changeFolder, deleteFolder, folders } from "../state/folders.ts";
import { go, hashOf, type Route, route } from "../state/route.ts";
import { isStoreReady } from "../state/storage.ts";
import { Icon } from "./Icon.tsx";
import { Menu } from "./Menu.tsx";
import { isComposing } from "./shortcuts.ts";

const PAGE = 100; // conversations that are drawn at first, and each time the end comes into view
const SEARCH_MS = 150;
const DRAGGED = "application/x-candle-vllm-conversation";

export const follow = (to: Route) => (event: MouseEvent) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  isSidebarOver.value = false;
  go(to);
  if (to.page === "chat" && !to.id) requestAnimationFrame(() => document.getElementById("composer")?.focus());
};

interface Group {
  name: string;
  members: readonly Conversation[];
  folder?: Folder;
}

export function ConversationList({ query }: { query: string }) {
  const found = useFound(query);
  const [limit, setLimit] = useState(PAGE);
  const end = useRef<HTMLDivElement>(null);
  const all = conversations.value;
  const groups = found ? byAge(all.filter((one) => found.has(one.id))) : grouped(all);
  const shown = groups.filter(({ members, folder }) => members.length > 0 || folder);
  const listed = shown.reduce((sum, { members, folder }) => sum + (folder && !folder.isOpen ? 0 : members.length), 0);
  useEffect(() => {
    if (!end.current) return undefined;
    const watcher = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && setLimit(limit + PAGE));
    watcher.observe(end.current);
    return () => watcher.disconnect();
  }, [limit, limit < listed]);
  if (!shown.length && isStoreReady.value) {
    return <p class="list-empty">{query ? t.value.nothingFound : t.value.noConversations}</p>;
  }
  let left = limit;
  return (
    <div class="conversations" {...dropTarget(null)}>
      {shown.map(({ name, members, folder }) => {
        const drawn = folder && !folder.isOpen ? [] : members.slice(0, Math.max(0, left));
        left -= drawn.length;
        if (folder) return <FolderView key={folder.id} folder={folder} count={members.length} drawn={drawn} />;
        return drawn.length > 0 && (
          <section key={name}>
            <h2 class="period">{name}</h2>
            <ul>{drawn.map((one) => <Item key={one.id} conversation={one} />)}</ul>
          </section>
        );
      })}
      {limit < listed && <div ref={end} class="list-end" />}
    </div>
  );
}

function grouped(all: readonly Conversation[]): Group[] {
  const members = new Map<string | null, Conversation[]>(folders.value.map(({ id }) => [id, []]));
  const [pinned, others]: [Conversation[], Conversation[]] = [[], []];
  for (const one of all) (one.pinned ? pinned : (members.get(one.folder) ?? others)).push(one);
  return [
    { name: t.value.pinned, members: pinned },
    ...folders.value.map((folder) => ({ name: folder.name, folder, members: members.get(folder.id)! })),
    ...byAge(others),
  ];
}

const PERIODS = ["today", "yesterday", "week", "earlier"] as const;

const byAge = (all: readonly Conversation[]): Group[] =>
  PERIODS.map((name) => ({ name: t.value.periods[name], members: all.filter((one) => period(one.updated) === name) }));

function period(time: number): (typeof PERIODS)[number] {
  const today = new Date().setHours(0, 0, 0, 0);
  const day = 86_400_000;
  if (time >= today) return "today";
  if (time >= today - day) return "yesterday";
  return time >= today - 7 * day ? "week" : "earlier";
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

function FolderView({ folder, count, drawn }: { folder: Folder; count: number; drawn: readonly Conversation[] }) {
  const { id, name, isOpen } = folder;
  const [renaming, setRenaming] = useState(false);
  const list = useId();
  const remove = () => confirmFirst({
    title: t.value.deleteFolder, text: t.value.deleteFolderText(name), action: t.value.delete, onConfirm: () => deleteFolder(id),
  });
  return (
    <section class="folder" {...dropTarget(id)}>
      <div class="conversation">
        {renaming ? (
          <Rename value={name} onKeep={(to) => changeFolder(id, { name: to })} onDone={() => setRenaming(false)} />
        ) : (
          <>
            <h2>
              <button type="button" class="conversation-link folder-name" aria-expanded={isOpen} aria-controls={list} title={name} onClick={() => changeFolder(id, { isOpen: !isOpen })}>
                <Icon name={isOpen ? "down" : "right"} /><span>{name}</span>{" "}<span class="count">{count}</span>
              </button>
            </h2>
            <Menu label={t.value.actionsOf(name)} items={[
              { icon: "edit", label: t.value.rename, run: () => setRenaming(true) },
              { icon: "trash", label: t.value.delete, run: remove },
            ]} />
          </>
        )}
      </div>
      <ul id={list} hidden={!isOpen}>{drawn.map((one) => <Item key={one.id} conversation={one} />)}</ul>
    </section>
  );
}

/** Where a conversation can be dropped: a folder, or, with null, beside all of them. */
function dropTarget(folder: string | null) {
  return {
    onDragOver: (event: DragEvent) => {
      if (event.dataTransfer?.types.includes(DRAGGED)) event.preventDefault();
    },
    onDrop: (event: DragEvent) => {
      const id = event.dataTransfer?.getData(DRAGGED);
      if (!id) return;
      event.preventDefault();
      event.stopPropagation();
      organize(id, { folder });
    },
  };
}

function Item({ conversation }: { conversation: Conversation }) {
  const { id, title, pinned } = conversation;
  const [renaming, setRenaming] = useState(false);
  const to: Route = { page: "chat", id };
  const isCurrent = route.value.page === "chat" && route.value.id === id;
  if (renaming) return <li class="conversation"><Rename value={title} onKeep={(name) => rename(id, name)} onDone={() => setRenaming(false)} /></li>;
  const remove = () => confirmFirst({
    title: t.value.deleteChat, text: t.value.deleteChatText(title), action: t.value.delete,
    onConfirm: () => void deleteChat(id),
  });
  return (
    <li class="conversation">
      <a class="conversation-link" dir="auto" href={hashOf(to)} aria-current={isCurrent ? "page" : undefined} title={title}
        onClick={follow(to)} onDblClick={() => setRenaming(true)} onDragStart={(event) => event.dataTransfer?.setData(DRAGGED, id)}>
        {title}
      </a>
      <Menu label={t.value.actionsOf(title)} items={[
        { icon: "pin", label: pinned ? t.value.unpin : t.value.pin, run: () => organize(id, { pinned: !pinned }) },
        { icon: "edit", label: t.value.rename, run: () => setRenaming(true) },
        { icon: "folder", label: t.value.moveTo, run: () => (open.value = { kind: "move", id }) },
        { icon: "download", label: t.value.exportOne, run: () => (open.value = { kind: "export", id }) },
        { icon: "trash", label: t.value.delete, run: remove },
      ]} />
    </li>
  );
}

function Rename({ value, onKeep, onDone }: { value: string; onKeep: (name: string) => void; onDone: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  useLayoutEffect(() => {
    field.current?.focus();
    field.current?.select();
  }, []);
  const keep = () => {
    if (field.current && field.current.value !== value) onKeep(field.current.value);
    onDone();
  };
  return (
    <input ref={field} class="input" dir="auto" defaultValue={value} aria-label={t.value.rename} maxLength={200} onBlur={keep}
      onKeyDown={(event) => {
        if (isComposing(event)) return;
        if (event.key === "Enter") keep();
        if (event.key === "Escape") {
          event.stopPropagation();
          onDone();
        }
      }} />
  );
}
