// What the server says of itself: models, MCP servers, counts.

import { ApiError, getJson, postJson, send } from "./http.ts";
import type { McpResult, McpServer, McpTool, ModelCard } from "./types.ts";

interface List<T> {
  data: T[];
}

export const listModels = async (): Promise<ModelCard[]> => (await getJson<List<ModelCard>>("v1/models")).data;

export const loadModel = (id: string): Promise<unknown> => postJson("v1/models/load", { model: id });

export const unloadModel = (id: string): Promise<unknown> => postJson("v1/models/unload", { model: id });

/** The MCP servers, or undefined where this server has none. */
export async function listMcpServers(): Promise<McpServer[] | undefined> {
  return orNothing(async () => (await getJson<List<McpServer>>("v1/mcp/servers")).data);
}

export async function listMcpTools(): Promise<McpTool[] | undefined> {
  return orNothing(async () => (await getJson<List<McpTool>>("v1/mcp/tools")).data);
}

async function orNothing<T>(ask: () => Promise<T>): Promise<T | undefined> {
  try {
    return await ask();
  } catch (error) {
    if (error instanceof ApiError && error.info.status === 404) return undefined;
    throw error;
  }
}

/** Runs a tool that the user has agreed to. */
export const callTool = (name: string, args: object, signal: AbortSignal): Promise<McpResult> =>
  postJson("v1/mcp/call", { name, arguments: args, approved: true }, signal);

export const serverVersion = async (): Promise<string> => (await getJson<{ version: string }>("version")).version;

export async function readMetrics(): Promise<string> {
  return (await send("metrics", { headers: { accept: "text/plain" } })).text();
}
