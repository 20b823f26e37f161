// SPDX-License-Identifier: MIT
// Wire types: the parts of the server's answers that the page reads.

export interface ModelCard {
  id: string;
  created?: number;
  status: string;
  default: boolean;
  loading?: LoadProgress;
  failure?: string; // of what kind it is
  architecture?: string;
  quantization?: string;
  dtype?: string;
  num_parameters?: number;
  weight_bytes?: number;
  kv_cache_bytes?: number;
  root?: string;
  parent?: string; // of an adapter: the model that it is for
  max_model_len?: number;
  tool_parser?: string | null;
  reasoning_parser?: string | null;
  modalities?: string[]; // what the model reads
  default_sampling?: Record<string, number>;
}

/** What is done while a model is loaded, and how much of it; null where nobody knows. */
export interface LoadProgress {
  what: string;
  percent: number | null;
}

/** What a server's models take, whether they fit, and what is being fetched. */
export interface Inventory {
  changes: boolean; // whether models may be fetched and removed here
  memoryFree: number;
  diskFree: number;
  models: readonly StockedModel[];
  known: readonly KnownModel[];
  pulls: readonly Pull[];
}

export interface StockedModel {
  id: string;
  size: number;
  needed: number | null;
  fits: string | null;
  removable: boolean;
}

export interface KnownModel {
  name: string;
  model: string;
  needed: number;
  fits: string | null;
  served: string | null;
}

export interface Pull {
  model: string;
  state: string;
  done: number;
  total: number;
  needed: number;
  fits: string | null;
  failure: string;
  error: string;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
  completion_tokens_details?: OutputCounts | null;
  prompt_time_costs?: number;
  completion_time_costs?: number;
}

/** Of an answer's tokens: thoughts, guesses that were tried, and what came of those. */
export interface OutputCounts {
  reasoning_tokens?: number;
  draft_tokens?: number;
  accepted_draft_tokens?: number;
}

export interface TokenLogprob {
  token: string;
  logprob: number;
  top_logprobs?: { token: string; logprob: number }[];
}

export interface ToolCallDelta {
  index: number;
  id?: string;
  function?: { name?: string; arguments?: string };
}

export interface ChatChunk {
  choices: {
    index: number;
    delta: {
      content?: string | null;
      reasoning_content?: string | null;
      tool_calls?: ToolCallDelta[] | null;
    };
    logprobs?: { content?: TokenLogprob[] | null } | null;
    finish_reason?: string | null;
  }[];
  usage?: Usage | null;
  read?: number; // share of the prompt that has been computed, from 0 to 1
}

export type WireMessage =
  | { role: "system" | "user"; content: string | WirePart[] }
  | { role: "assistant"; content: string | null; reasoning_content?: string; tool_calls?: WireToolCall[] }
  | { role: "tool"; tool_call_id: string; content: string };

export type WirePart = { type: "text"; text: string } | { type: "image_url"; image_url: { url: string } };

export interface WireToolCall {
  id: string;
  type: "function";
  function: { name: string; arguments: string };
}

export interface McpServer {
  name: string;
  transport: string;
  state: string;
  error: string | null;
  protocol_version: string | null;
  reconnects: number;
  log: string[];
}

export interface McpTool {
  type: "function";
  function: { name: string; description: string; parameters: Record<string, unknown> };
  server: string | null;
  original_name: string;
  read_only: boolean;
}

export interface McpContent {
  kind: string;
  text?: string | null;
  data?: string | null;
  mime_type?: string | null;
  uri?: string | null;
  name?: string | null;
}

export interface McpResult {
  status: string;
  content: McpContent[];
  is_error: boolean;
  text: string;
  seconds: number;
}
