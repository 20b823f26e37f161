// SPDX-License-Identifier: MIT
// The tools page: MCP servers, their state and log, and which of their tools models may use.

import { useEffect, useState } from "preact/hooks";
import { errorInfo } from "../api/http.ts";
import type { McpServer, McpTool } from "../api/types.ts";
import { named, t } from "../i18n/index.ts";
import { askAgain, isAllowed, mcpServers, mcpTools, refreshMcp, switchTools } from "../state/mcp.ts";
import { pageKey } from "../state/page-key.ts";
import { apiKey, preferences } from "../state/preferences.ts";
import { describe } from "./errors.ts";
import { Icon } from "./Icon.tsx";
import { SidebarButton } from "./SidebarButton.tsx";

const EVERY_MS = 4000;

export function ToolsPage() {
  const failure = useFresh();
  const servers = mcpServers.value;
  const local = mcpTools.value.filter((tool) => !servers?.some((server) => server.name === tool.server));
  return (
    <>
      <header class="page-head"><SidebarButton /><h1>{t.value.tools}</h1></header>
      <div class="scroller"><div class="page">
        {failure && <div class="notice error" role="alert"><Icon name="warning" /><p>{failure}</p></div>}
        {servers && servers.length > 0 && !apiKey.value.key && !pageKey.value && <div class="notice"><Icon name="info" /><p>{t.value.toolsNeedKey}</p></div>}
        <p class="faint">{servers ? t.value.toolsText : t.value.noMcp}</p>
        {servers?.length === 0 && <p class="empty">{t.value.noServers}</p>}
        {servers?.map((server) => <ServerCard key={server.name} server={server} tools={mcpTools.value.filter((tool) => tool.server === server.name)} />)}
        {local.length > 0 && <section class="card"><header><h2>{t.value.otherTools}</h2></header><Tools tools={local} /></section>}
      </div></div>
    </>
  );
}

function useFresh(): string {
  const [failure, setFailure] = useState("");
  useEffect(() => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    let isShown = true;
    const ask = async () => {
      try {
        if (!document.hidden) await refreshMcp();
        setFailure("");
      } catch (error) {
        setFailure(describe(errorInfo(error)));
      }
      if (isShown) timer = setTimeout(() => void ask(), EVERY_MS);
    };
    void ask();
    return () => {
      isShown = false;
      clearTimeout(timer);
    };
  }, []);
  return failure;
}

function ServerCard({ server, tools }: { server: McpServer; tools: readonly McpTool[] }) {
  const kind = named({ ready: "good", failed: "bad", connecting: "busy" }, server.state) ?? "off";
  const names = tools.map((tool) => tool.function.name);
  return (
    <section class="card">
      <header>
        <span class={`dot ${kind}`} aria-hidden="true" />
        <h2>{server.name}</h2>
        <span class="faint small">{[named(t.value.serverStates, server.state) ?? server.state, server.transport, server.protocol_version].filter(Boolean).join(" · ")}</span>
        <span class="spring" />
        {names.length > 1 && (
          <span class="both">
            <button type="button" class="button small" onClick={() => switchTools(names, true)}>{t.value.allOn}</button>
            <button type="button" class="button small" onClick={() => switchTools(names, false)}>{t.value.allOff}</button>
          </span>
        )}
      </header>
      {server.error && <p class="server-error">{server.error}</p>}
      {server.reconnects > 0 && <p class="faint small">{t.value.reconnects(server.reconnects)}</p>}
      <Tools tools={tools} />
      {server.log.length > 0 && (
        <details class="log"><summary>{t.value.log(server.log.length)}</summary><pre tabIndex={0} aria-label={t.value.log(server.log.length)}>{server.log.join("\n")}</pre></details>
      )}
    </section>
  );
}

function Tools({ tools }: { tools: readonly McpTool[] }) {
  const off = new Set(preferences.value.toolsOff);
  if (!tools.length) return <p class="faint small">{t.value.noTools}</p>;
  return (
    <ul class="tools">
      {tools.map((tool) => {
        const { name, description } = tool.function;
        return (
          <li key={name}>
            <label class="check">
              <input type="checkbox" checked={!off.has(name)} onChange={(event) => switchTools([name], event.currentTarget.checked)} />
              <span><span class="tool-name">{name}</span>{tool.read_only && <span class="tag">{t.value.readOnly}</span>}<span class="tool-description">{description}</span></span>
            </label>
            {isAllowed(tool) && <button type="button" class="button small" onClick={() => askAgain(name)}>{t.value.askAgain}</button>}
          </li>
        );
      })}
    </ul>
  );
}
