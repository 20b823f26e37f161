// SPDX-License-Identifier: MIT
// The tools of the chat that is shown: off until they are turned on here.

import { useState } from "preact/hooks";
import type { McpTool } from "../api/types.ts";
import { t } from "../i18n/index.ts";
import { mcpTools, offeredTools, toolsOf } from "../state/mcp.ts";
import { cardFor } from "../state/models.ts";
import { changeStart, shownStart } from "../state/new-chat.ts";
import { pageKey } from "../state/page-key.ts";
import { apiKey } from "../state/preferences.ts";
import { go } from "../state/route.ts";
import { Icon } from "./Icon.tsx";
import { Popover } from "./Popover.tsx";

const namesOf = (tools: readonly McpTool[]): string[] => tools.map((tool) => tool.function.name);

export function ToolsSwitch() {
  const [isOpen, setOpen] = useState(false);
  if (!mcpTools.value.length) return null;
  const start = shownStart.value;
  const all = offeredTools.value;
  const on = new Set(namesOf(toolsOf(start)));
  const cannot = cardFor(start.model)?.tool_parser === null;
  const label = cannot ? t.value.noToolsHere : on.size ? t.value.toolsOn(on.size, all.length) : t.value.toolsOff;
  const turn = (tools: readonly McpTool[], wanted: boolean) => {
    const names = new Set(start.tools);
    for (const name of namesOf(tools)) names[wanted ? "add" : "delete"](name);
    changeStart({ tools: [...names] });
  };
  const isKeyless = !apiKey.value.key && !pageKey.value; // no call would run
  const turnAll = (wanted: boolean) => (wanted ? turn(all, true) : changeStart({ tools: [] }));
  const servers = [...new Set(all.map((tool) => tool.server))];
  return (
    <Popover above label={label} buttonClass={on.size && !cannot ? "text-button on" : "text-button"} isOpen={isOpen} onToggle={setOpen}
      button={<><Icon name="tool" />{label}</>}>
      {isKeyless && <p class="notice">{t.value.toolsNeedKey}</p>}
      <label class="check switch">
        <input type="checkbox" role="switch" checked={on.size > 0} disabled={!all.length || (isKeyless && !on.size)} onChange={(event) => turnAll(event.currentTarget.checked)} />
        <span>{t.value.toolsInChat}</span>
      </label>
      <p class="hint">{t.value.toolsInChatText}</p>
      {servers.map((server) => {
        const tools = all.filter((tool) => tool.server === server);
        return <ServerTools key={server} name={server || t.value.otherTools} tools={tools} on={on} isKeyless={isKeyless} onTurn={turn} />;
      })}
      <button type="button" class="button small" onClick={() => go({ page: "tools" })}>{t.value.manageTools}</button>
    </Popover>
  );
}

interface ServerToolsProps {
  name: string;
  tools: readonly McpTool[];
  on: ReadonlySet<string>;
  isKeyless: boolean;
  onTurn: (tools: readonly McpTool[], wanted: boolean) => void;
}

function ServerTools({ name, tools, on, isKeyless, onTurn }: ServerToolsProps) {
  const count = tools.filter((tool) => on.has(tool.function.name)).length;
  return (
    <div class="tool-group" role="group" aria-label={name}>
      <label class="check">
        <input type="checkbox" checked={count === tools.length} indeterminate={count > 0 && count < tools.length} disabled={isKeyless && !count}
          onChange={(event) => onTurn(tools, event.currentTarget.checked)} />
        <strong>{name}</strong>
      </label>
      <ul>
        {tools.map((tool) => (
          <li key={tool.function.name}>
            <label class="check" title={tool.function.description}>
              <input type="checkbox" checked={on.has(tool.function.name)} disabled={isKeyless && !on.has(tool.function.name)} onChange={(event) => onTurn([tool], event.currentTarget.checked)} />
              <span class="tool-name">{tool.function.name}</span>
            </label>
          </li>
        ))}
      </ul>
    </div>
  );
}
