// SPDX-License-Identifier: MIT
// What the server says of itself: models, MCP servers, counts.

import { ApiError, getJson, jsonRequest, postJson, send } from "./http.ts";
import { fields, readInventory, readModel, readResult, readServer, readShown, readTool, text, underBases } from "./readers.ts";
import type { Inventory, McpResult, McpServer, McpTool, ModelCard } from "./types.ts";

export const listModels = async (): Promise<ModelCard[]> => underBases(await listOf("v1/models", readModel));

async function listOf<T>(path: string, read: (data: unknown) => T[]): Promise<T[]> {
  const { data } = fields(await getJson(path));
  if (!Array.isArray(data)) throw new ApiError({ kind: "format", message: "" });
  return data.flatMap(read);
}

/** Why models could not be loaded, in the server's words, by their first names; for who holds its management key. */
export async function listFailures(): Promise<Record<string, string>> {
  const { models } = fields(await getJson("v1/models/status"));
  const failed = (Array.isArray(models) ? models : []).map(fields).filter(({ id, error }) => text(id) && text(error));
  return Object.fromEntries(failed.map(({ id, error }) => [id, error]));
}

export const loadModel = (id: string): Promise<unknown> => postJson("v1/models/load", { model: id });

export const unloadModel = (id: string): Promise<unknown> => postJson("v1/models/unload", { model: id });

export const selectModel = (id: string): Promise<unknown> => postJson("v1/models/select", { model: id });

export async function takeStock(): Promise<Inventory> {
  const inventory = readInventory(await getJson("v1/models/inventory"));
  if (!inventory) throw new ApiError({ kind: "format", message: "" });
  return inventory;
}

export const showModel = async (id: string): Promise<Partial<ModelCard>> => readShown(await postJson("api/show", { model: id }));

/** Begins to fetch a model, or goes on with it; how far it is, the inventory says. */
export async function pullModel(name: string): Promise<void> {
  const { body } = await send("api/pull", jsonRequest({ model: name }));
  await body?.cancel();
}

export async function stopPull(name: string, remove: boolean): Promise<void> {
  await send("api/pull", { ...jsonRequest({ model: name, remove }), method: "DELETE" });
}

export async function deleteModel(id: string): Promise<void> {
  await send("api/delete", { ...jsonRequest({ model: id }), method: "DELETE" });
}

/** The MCP servers, or undefined where this server has none. */
export async function listMcpServers(): Promise<McpServer[] | undefined> {
  return orNothing(() => listOf("v1/mcp/servers", readServer));
}

export async function listMcpTools(): Promise<McpTool[] | undefined> {
  return orNothing(() => listOf("v1/mcp/tools", readTool));
}

async function orNothing<T>(ask: () => Promise<T>): Promise<T | undefined> {
  try {
    return await ask();
  } catch (error) {
    if (error instanceof ApiError && error.info.status === 404) return undefined;
    throw error;
  }
}

/** Runs a tool that the user has agreed to; with an own key in the place of the API key. */
export const callTool = async (name: string, args: object, signal: AbortSignal, ownKey = ""): Promise<McpResult> =>
  readResult(await postJson("v1/mcp/call", { name, arguments: args, approved: true }, signal, ownKey));

export const serverVersion = async (): Promise<string> => text(fields(await getJson("version")).version) ?? "";

export async function readMetrics(): Promise<string> {
  return (await send("metrics", { headers: { accept: "text/plain" } })).text();
}
