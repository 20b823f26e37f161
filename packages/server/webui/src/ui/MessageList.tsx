// SPDX-License-Identifier: MIT
// The messages of a branch. The last ones are drawn first, earlier ones when they come into view.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { AnswerView } from "./AnswerView.tsx";
import { Icon } from "./Icon.tsx";
import { QuestionView } from "./QuestionView.tsx";

const PAGE = 30;
const NEAR = 48; // pixels from the end that still count as being there

export function MessageList({ chat }: { chat: OpenChat }) {
  const scroller = useRef<HTMLDivElement>(null);
  const [count, setCount] = useState(PAGE);
  const { isAtEnd, toEnd } = useEnd(scroller, chat);
  const path = chat.path.value;
  const begun = useRef<string>(undefined); // the first message that is drawn stays so
  const [kept, wanted] = [path.indexOf(begun.current ?? ""), Math.max(0, path.length - count)];
  const first = kept < 0 ? wanted : Math.min(kept, wanted);
  begun.current = path[first];
  const top = useEarlier(scroller, first > 0, () => setCount(count + PAGE), count);
  return (
    <div class="scroller-frame">
      <div ref={scroller} class="scroller messages-frame" tabIndex={-1}>
        <ol class="messages" aria-label={t.value.messages}>
          {first > 0 && (
            <li ref={top} class="earlier">
              <button type="button" class="button small" onClick={() => setCount(count + PAGE)}>{t.value.earlier(first)}</button>
            </li>
          )}
          {path.slice(first).map((id) => <MessageView key={id} chat={chat} id={id} isLast={id === path.at(-1)} />)}
        </ol>
      </div>
      {!isAtEnd && (
        <button type="button" class="to-end" aria-label={t.value.toEnd} data-tip={t.value.toEnd} onClick={toEnd}><Icon name="down" /></button>
      )}
    </div>
  );
}

function MessageView({ chat, id, isLast }: { chat: OpenChat; id: string; isLast: boolean }) {
  const message = chat.message(id)?.value;
  if (!message) return null;
  return (
    <li class={`message ${message.role}${isLast ? " last" : ""}`}>
      {message.role === "user" ? (
        <QuestionView chat={chat} message={message} isLast={isLast} />
      ) : (
        <AnswerView chat={chat} message={message} isLast={isLast} />
      )}
    </li>
  );
}

/** Follows the end as it grows, until the user scrolls away from it. Another version is shown where the old one was. */
function useEnd(scroller: { current: HTMLDivElement | null }, chat: OpenChat) {
  const follows = useRef(true);
  const [isAtEnd, setAtEnd] = useState(true);
  const leaf = chat.path.value.at(-1);
  const before = useRef<string>(undefined);
  const toEnd = () => {
    follows.current = true;
    scroller.current?.scrollTo({ top: scroller.current.scrollHeight });
  };
  useLayoutEffect(() => {
    const path = chat.path.peek();
    if (before.current === undefined || path.includes(before.current) || chat.isBusy) toEnd();
    else follows.current = false;
    before.current = leaf;
  }, [leaf]);
  useEffect(() => {
    const frame = scroller.current;
    const content = frame?.firstElementChild;
    if (!frame || !content) return undefined;
    let last = frame.scrollTop;
    const onScroll = () => {
      const near = frame.scrollHeight - frame.scrollTop - frame.clientHeight < NEAR;
      if (near) follows.current = true;
      else if (frame.scrollTop < last - 1) follows.current = false;
      last = frame.scrollTop;
      setAtEnd(near || follows.current);
    };
    const grown = new ResizeObserver(() => {
      if (follows.current) frame.scrollTop = frame.scrollHeight;
      onScroll(); // what became shorter than the frame scrolls no more, and says nothing
    });
    grown.observe(content);
    grown.observe(frame);
    frame.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      grown.disconnect();
      frame.removeEventListener("scroll", onScroll);
    };
  }, []);
  return { isAtEnd, toEnd };
}

/** Asks for earlier messages when their place comes near, and keeps what is read where it is. */
function useEarlier(scroller: { current: HTMLDivElement | null }, has: boolean, more: () => void, count: number) {
  const top = useRef<HTMLLIElement>(null);
  const before = useRef(0);
  useLayoutEffect(() => {
    const frame = scroller.current;
    if (frame && before.current && !CSS.supports("overflow-anchor", "auto")) {
      frame.scrollTop += frame.scrollHeight - before.current;
    }
    before.current = 0;
  }, [count]);
  useEffect(() => {
    if (!has || !top.current || !scroller.current) return undefined;
    const watcher = new IntersectionObserver(
      (seen) => {
        if (!seen.some((one) => one.isIntersecting)) return;
        before.current = scroller.current?.scrollHeight ?? 0;
        more();
      },
      { root: scroller.current, rootMargin: "800px 0px 0px 0px" },
    );
    watcher.observe(top.current);
    return () => watcher.disconnect();
  }, [has, count]);
  return top;
}
