// SPDX-License-Identifier: MIT
// A tool call: what is asked for, whether it may run, and what came of it.

import { useRef } from "preact/hooks";

import type { McpContent } from "../api/types.ts";
import type { Decision } from "../chat/turn.ts";
import type { ToolCall } from "../chat/types.ts";
import { formatSeconds, t } from "../i18n/index.ts";
import { escapeUnseen } from "../markdown/unseen.ts";
import { safeLink, safePicture } from "../markdown/links.ts";
import { findTool } from "../state/mcp.ts";
import { Icon, type IconName } from "./Icon.tsx";

const ICONS: Readonly<Record<ToolCall["state"], IconName>> = {
  writing: "edit", waiting: "warning", approved: "play", running: "refresh", done: "check", failed: "warning",
  denied: "close", unknown: "info",
};

export function ToolCard({ call, onDecide }: { call: ToolCall; onDecide: (decision: Decision) => void }) {
  const tool = findTool(call.name);
  const isWaiting = call.state === "waiting";
  const busy = call.state === "writing" || call.state === "running";
  const card = useRef<HTMLElement>(null);
  const decide = (decision: Decision) => {
    card.current?.focus(); // the buttons vanish, and the keyboard stays where it was
    onDecide(decision);
  };
  return (
    <section ref={card} tabIndex={-1} class={`tool-card ${call.state}`} aria-label={t.value.toolCall(call.name)}>
      <header>
        <Icon name={ICONS[call.state]} />
        <span class="tool-name">{call.name}</span>
        {tool?.server && <span class="tool-server">{tool.server}</span>}
        <span class="spring" />
        <span class={`tool-state${busy ? " pulse" : ""}`}>
          {t.value.callStates[call.state]}
          {call.seconds !== undefined && ` · ${formatSeconds(call.seconds)}`}
        </span>
      </header>
      {isWaiting ? <pre class="arguments" tabIndex={0} aria-label={t.value.arguments}>{pretty(call.arguments)}</pre> : (
        <details open={call.state === "writing"}>
          <summary>{t.value.arguments}</summary>
          <pre class="arguments" tabIndex={0} aria-label={t.value.arguments}>{pretty(call.arguments)}</pre>
        </details>
      )}
      {isWaiting && (
        <div class="approval" role="group" aria-label={t.value.mayRun(call.name)}>
          <p>{t.value.mayRun(call.name)}</p>
          <button type="button" class="button primary" onClick={() => decide("once")}>{t.value.allowOnce}</button>
          {tool && <button type="button" class="button" onClick={() => decide("always")}>{t.value.allowAlways}</button>}
          <button type="button" class="button" onClick={() => decide("deny")}>{t.value.deny}</button>
        </div>
      )}
      {call.result !== undefined && <Result call={call} />}
    </section>
  );
}

function Result({ call }: { call: ToolCall }) {
  const others = call.content?.filter((one) => one.kind !== "text") ?? [];
  return (
    <details class="result" open={call.state === "failed"}>
      <summary>{call.state === "failed" ? t.value.error : t.value.result}</summary>
      <pre tabIndex={0} aria-label={t.value.result}>{call.result}</pre>
      {others.map((content, index) => <Content key={index} content={content} />)}
    </details>
  );
}

function Content({ content }: { content: McpContent }) {
  const { kind, data, mime_type: type, uri, name } = content;
  const picture = kind === "image" && data ? safePicture(`data:${type ?? ""};base64,${data}`) : undefined;
  if (picture) return <img src={picture} alt={name ?? t.value.image} />;
  const address = uri ? safeLink(uri) : undefined;
  const label = name ?? uri ?? type ?? kind;
  if (address) return <p><a href={address} title={address} target="_blank" rel="noopener noreferrer nofollow">{label}</a></p>;
  return <p class="faint small">{kind}: {label}</p>;
}

function pretty(text: string): string {
  try {
    return escapeUnseen(JSON.stringify(JSON.parse(text), null, 2));
  } catch {
    return escapeUnseen(text);
  }
}
