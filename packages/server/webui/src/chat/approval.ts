// SPDX-License-Identifier: MIT
// Which tools may run without being asked for, and on what they were when the user said so.

import type { McpTool } from "../api/types.ts";

/** What a tool says of itself, in full. A tool that changed is asked for again. */
export function fingerprint({ server, original_name, function: { name, description, parameters } }: McpTool): string {
  return JSON.stringify([server, original_name, name, description, parameters]);
}

export type AlwaysAllowed = Readonly<Record<string, string>>; // fingerprints by name

export function isAlwaysAllowed(tool: McpTool, allowed: AlwaysAllowed): boolean {
  return Object.hasOwn(allowed, tool.function.name) && allowed[tool.function.name] === fingerprint(tool);
}
