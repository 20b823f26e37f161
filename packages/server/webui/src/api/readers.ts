// SPDX-License-Identifier: MIT
// What comes from a server or a file is looked at before it is used: the few shapes, read field by field.

import type { ChatChunk, Inventory, McpContent, McpResult, McpServer, McpTool, ModelCard, TokenLogprob, ToolCallDelta, Usage } from "./types.ts";

export const fields = (data: unknown): Record<string, unknown> =>
  typeof data === "object" && data !== null ? (data as Record<string, unknown>) : {};
export const text = (value: unknown): string | undefined => (typeof value === "string" ? value : undefined);
export const number = (value: unknown): number | undefined =>
  typeof value === "number" && Number.isFinite(value) ? value : undefined;
const list = (value: unknown): readonly unknown[] => (Array.isArray(value) ? value : []);

const MAX_CALLS = 128; // of one answer
export const OUTPUT_COUNTS = ["reasoning_tokens", "draft_tokens", "accepted_draft_tokens"] as const;

/** A chunk of a chat stream; undefined where it is none. */
export function readChunk(data: unknown): ChatChunk | undefined {
  const given = fields(data);
  if (!Array.isArray(given.choices)) return undefined;
  const chunk: ChatChunk = { choices: given.choices.map(readChoice) };
  const usage = readUsage(given.usage);
  if (usage) chunk.usage = usage;
  const { processed, total } = fields(given.prompt_progress);
  const [done, all] = [number(processed), number(total)];
  if (done !== undefined && all) chunk.read = Math.min(1, Math.max(0, done / all));
  return chunk;
}

function readChoice(data: unknown): ChatChunk["choices"][number] {
  const { index, delta, logprobs, finish_reason: finish } = fields(data);
  const given = fields(delta);
  return {
    index: number(index) ?? 0,
    delta: {
      content: text(given.content) ?? null,
      reasoning_content: text(given.reasoning_content) ?? text(given.reasoning) ?? null,
      tool_calls: list(given.tool_calls).flatMap(readCallDelta),
    },
    logprobs: { content: list(fields(logprobs).content).flatMap(readLogprob) },
    finish_reason: text(finish) ?? null,
  };
}

// The index says where in a list the call stands, so it must not be anything else.
function readCallDelta(data: unknown): ToolCallDelta[] {
  const { index, id, function: called } = fields(data);
  if (typeof index !== "number" || !Number.isInteger(index) || index < 0 || index >= MAX_CALLS) return [];
  const { name, arguments: written } = fields(called);
  return [{ index, id: text(id) ?? "", function: { name: text(name) ?? "", arguments: text(written) ?? "" } }];
}

export function readUsage(data: unknown): Usage | undefined {
  const given = fields(data);
  const [prompt, completion] = [number(given.prompt_tokens), number(given.completion_tokens)];
  if (prompt === undefined || completion === undefined) return undefined;
  const usage: Usage = { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion };
  const cached = number(fields(given.prompt_tokens_details).cached_tokens);
  const costs = number(given.completion_time_costs);
  if (cached !== undefined) usage.prompt_tokens_details = { cached_tokens: cached };
  for (const name of OUTPUT_COUNTS) {
    const value = number(fields(given.completion_tokens_details)[name]);
    if (value !== undefined) (usage.completion_tokens_details ??= {})[name] = value;
  }
  if (costs !== undefined) usage.completion_time_costs = costs;
  return usage;
}

export function readLogprob(data: unknown): TokenLogprob[] {
  const given = fields(data);
  const [token, logprob] = [text(given.token), number(given.logprob)];
  if (token === undefined || logprob === undefined) return [];
  return [{ token, logprob, top_logprobs: list(given.top_logprobs).slice(0, 20).flatMap(readLogprob) }];
}

export function readContent(data: unknown): McpContent {
  const given = fields(data);
  const content: McpContent = { kind: text(given.kind) ?? "text" };
  for (const name of ["text", "data", "mime_type", "uri", "name"] as const) {
    const value = text(given[name]);
    if (value !== undefined) content[name] = value;
  }
  return content;
}

export function readModel(data: unknown): ModelCard[] {
  const given = fields(data);
  const id = text(given.id);
  if (id === undefined) return [];
  const card: ModelCard = { id, status: text(given.status) ?? "", default: given.default === true };
  const [root, parent, most, created] = [text(given.root), text(given.parent), number(given.max_model_len), number(given.created)];
  if (root !== undefined) card.root = root;
  if (parent !== undefined) card.parent = parent;
  if (most !== undefined) card.max_model_len = most;
  if (created !== undefined) card.created = created;
  for (const name of ["tool_parser", "reasoning_parser"] as const) {
    const value = given[name];
    if (value === null || typeof value === "string") card[name] = value;
  }
  if (Array.isArray(given.modalities)) card.modalities = given.modalities.filter((one) => typeof one === "string");
  for (const name of ["failure", "architecture", "quantization", "dtype"] as const) {
    const value = text(given[name]);
    if (value) card[name] = value;
  }
  for (const name of ["num_parameters", "weight_bytes", "kv_cache_bytes"] as const) {
    const value = number(given[name]);
    if (value && value > 0) card[name] = value;
  }
  const { what, percent } = fields(given.loading);
  if (typeof what === "string") card.loading = { what, percent: number(percent) ?? null };
  const defaults = Object.entries(fields(given.default_sampling)).filter((one): one is [string, number] => number(one[1]) !== undefined);
  if (defaults.length) card.default_sampling = Object.fromEntries(defaults);
  return [card];
}

/** Whether two cards are names of one model. Two models may have the same files, but not all the rest. */
export function isSameModel({ id: _, ...one }: ModelCard, { id: __, ...other }: ModelCard): boolean {
  return one.parent === undefined && one.root !== undefined && JSON.stringify(one) === JSON.stringify(other);
}

/** Every model with its adapters behind it; what is known of a model holds for them, too. */
export function underBases(cards: readonly ModelCard[]): ModelCard[] {
  const ids = new Set(cards.map(({ id }) => id));
  const adapters = cards.filter(({ parent }) => parent !== undefined && ids.has(parent));
  const behind = (card: ModelCard) =>
    adapters.filter(({ parent }) => parent === card.id).map((adapter) => ({ ...card, ...adapter, default: false }));
  return cards.filter((card) => !adapters.includes(card)).flatMap((card) => [card, ...behind(card)]);
}

export function readInventory(data: unknown): Inventory | undefined {
  const given = fields(data);
  if (!Array.isArray(given.models)) return undefined;
  return {
    changes: given.changes === true,
    memoryFree: count(given.memory_free),
    diskFree: count(given.disk_free),
    models: list(given.models).map(fields).flatMap(({ id, size, needed, fits, removable }) =>
      typeof id === "string" ? [{ id, size: count(size), needed: number(needed) ?? null, fits: text(fits) ?? null, removable: removable === true }] : []),
    known: list(given.known).map(fields).flatMap(({ name, model, needed, fits, served }) =>
      typeof name === "string" ? [{ name, model: text(model) ?? name, needed: count(needed), fits: text(fits) ?? null, served: text(served) ?? null }] : []),
    pulls: list(given.pulls).map(fields).flatMap(({ model, state, done, total, needed, fits, failure, error }) =>
      typeof model === "string" ? [{ model, state: text(state) ?? "", done: count(done), total: count(total), needed: count(needed), fits: text(fits) ?? null, failure: text(failure) ?? "", error: text(error) ?? "" }] : []),
  };
}

const count = (value: unknown): number => Math.max(0, number(value) ?? 0);

/** What the files of a model that is not loaded say of it. */
export function readShown(data: unknown): Partial<ModelCard> {
  const { details, model_info: info } = fields(data);
  const known = fields(info);
  const architecture = text(known["general.architecture"]);
  const shown: Partial<ModelCard> = {};
  if (architecture) shown.architecture = architecture;
  const [quantization, parameters, context] = [
    text(fields(details).quantization_level), number(known["general.parameter_count"]), number(known[`${architecture}.context_length`]),
  ];
  if (quantization) shown.quantization = quantization;
  if (parameters && parameters > 0) shown.num_parameters = parameters;
  if (context && context > 0) shown.max_model_len = context;
  return shown;
}

export function readServer(data: unknown): McpServer[] {
  const given = fields(data);
  const name = text(given.name);
  if (name === undefined) return [];
  return [{
    name,
    transport: text(given.transport) ?? "",
    state: text(given.state) ?? "",
    error: text(given.error) ?? null,
    protocol_version: text(given.protocol_version) ?? null,
    reconnects: number(given.reconnects) ?? 0,
    log: list(given.log).filter((line) => typeof line === "string"),
  }];
}

export function readTool(data: unknown): McpTool[] {
  const given = fields(data);
  const { name, description, parameters } = fields(given.function);
  if (typeof name !== "string" || !name) return [];
  return [{
    type: "function",
    function: { name, description: text(description) ?? "", parameters: fields(parameters) },
    server: text(given.server) ?? null,
    original_name: text(given.original_name) ?? name,
    read_only: given.read_only === true,
  }];
}

/** The result of a tool; what is no result counts as a failure. */
export function readResult(data: unknown): McpResult {
  const given = fields(data);
  return {
    status: text(given.status) ?? "failed",
    content: list(given.content).map(readContent),
    is_error: given.is_error !== false,
    text: text(given.text) ?? "",
    seconds: number(given.seconds) ?? 0,
  };
}
