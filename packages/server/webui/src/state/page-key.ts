// SPDX-License-Identifier: MIT
// The key in the address that a server without API keys prints: by it the page, and no other, may run tools.

import { signal } from "@preact/signals";
import { isRefusal } from "../api/http.ts";
import { callTool } from "../api/server.ts";
import type { McpResult } from "../api/types.ts";
import { readPageKey, writePageKey } from "../store/preferences.ts";
import { hashOf, route } from "./route.ts";

const IN_ADDRESS = /^#key=([\w-]{32})$/;

export const pageKey = signal(readPageKey());

/** Takes the key out of the address, now and when an open page gets it. Comes before what else reads the address. */
export function followPageKey(): void {
  takeKey();
  addEventListener("popstate", takeKey);
  addEventListener("hashchange", takeKey);
}

function takeKey(): void {
  const found = IN_ADDRESS.exec(location.hash);
  if (!found) return;
  history.replaceState(null, "", hashOf(route.peek()));
  keepPageKey(found[1]!);
}

function keepPageKey(key: string): void {
  pageKey.value = key;
  writePageKey(key);
}

/** Runs a tool with the page's key, or, where the server does not know it any more, with the API key. */
export async function callToolFromPage(name: string, args: object, signal: AbortSignal): Promise<McpResult> {
  const key = pageKey.peek();
  if (!key) return callTool(name, args, signal);
  try {
    return await callTool(name, args, signal, key);
  } catch (error) {
    if (!isRefusal(error)) throw error;
    if (pageKey.peek() === key) keepPageKey("");
    return callTool(name, args, signal);
  }
}
