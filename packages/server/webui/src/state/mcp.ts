// SPDX-License-Identifier: MIT
// The server's MCP servers and tools, where it has some.

import { computed, signal } from "@preact/signals";
import { listMcpServers, listMcpTools } from "../api/server.ts";
import type { McpServer, McpTool } from "../api/types.ts";
import { fingerprint, isAlwaysAllowed } from "../chat/approval.ts";
import type { Conversation } from "../chat/types.ts";
import { prefer, preferences } from "./preferences.ts";

/** undefined: not known yet, or this server has no MCP. */
export const mcpServers = signal<readonly McpServer[] | undefined>(undefined);
export const mcpTools = signal<readonly McpTool[]>([]);

/** The tools that may be turned on in chats. */
export const offeredTools = computed<readonly McpTool[]>(() => {
  const off = new Set(preferences.value.toolsOff);
  return mcpTools.value.filter((tool) => !off.has(tool.function.name));
});

const POLL_MS = 2000;
const FAILED_MS = 15_000; // the server tries it again by itself
let polling: ReturnType<typeof setTimeout> | undefined;

/** Asks for servers and tools, and again while one of them is still connecting or has failed. */
export async function refreshMcp(): Promise<void> {
  clearTimeout(polling);
  const servers = await listMcpServers();
  mcpTools.value = servers ? ((await listMcpTools()) ?? []) : [];
  mcpServers.value = servers;
  const states = new Set(servers?.map(({ state }) => state));
  const pause = states.has("connecting") ? POLL_MS : states.has("failed") ? FAILED_MS : undefined;
  if (pause) polling = setTimeout(() => void refreshMcp().catch(() => undefined), pause);
}

/** The tools of a chat, by the names that are on in it. */
export function toolsOf({ tools }: Pick<Conversation, "tools">): readonly McpTool[] {
  const on = new Set(Array.isArray(tools) ? tools : []); // it was read from the browser's storage
  return offeredTools.value.filter((tool) => on.has(tool.function.name));
}

export const findTool = (name: string): McpTool | undefined => mcpTools.value.find((tool) => tool.function.name === name);

export function switchTools(names: readonly string[], on: boolean): void {
  const off = new Set(preferences.value.toolsOff);
  for (const name of names) off[on ? "delete" : "add"](name);
  prefer({ toolsOff: [...off] });
}

export const isAllowed = (tool: McpTool): boolean => isAlwaysAllowed(tool, preferences.value.allowed);

export function allowAlways(tool: McpTool): void {
  prefer({ allowed: { ...preferences.value.allowed, [tool.function.name]: fingerprint(tool) } });
}

export function askAgain(name: string): void {
  const { [name]: _, ...others } = preferences.value.allowed;
  prefer({ allowed: others });
}
