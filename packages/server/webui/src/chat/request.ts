// SPDX-License-Identifier: MIT
// A branch of a conversation -> the body of a chat request.

import type { McpTool, WireMessage, WirePart } from "../api/types.ts";
import { withFiles } from "./files.ts";
import { wireFields } from "./settings.ts";
import type { ChatSettings, Message, Step, ToolCall, UserMessage } from "./types.ts";

const NOT_RUN = "The user did not approve this call; the tool was not run.";

export interface RequestParts {
  model: string | null;
  path: readonly Message[]; // the last one is the answer to write, or to go on with
  settings: ChatSettings;
  tools: readonly McpTool[];
  goOn: boolean; // continue the last step's text instead of beginning a new one
}

export function chatRequest({ model, path, settings, tools, goOn }: RequestParts): Record<string, unknown> {
  const messages: WireMessage[] = [];
  if (settings.system?.trim()) messages.push({ role: "system", content: settings.system });
  for (const message of path) messages.push(...wireMessages(message));
  const request: Record<string, unknown> = {
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_draft_counts: true,
    return_progress: true,
    // Without the field, the server would offer the model all tools of its MCP servers.
    tools: tools.map(({ type, function: { name, description, parameters } }) => ({ type, function: { name, description, parameters } })),
    ...wireFields(goOn ? { ...settings, schema: "" } : settings), // what goes on is not a whole answer by the schema
  };
  if (model) request.model = model;
  if (goOn) Object.assign(request, { continue_final_message: true, add_generation_prompt: false });
  return request;
}

function wireMessages(message: Message): WireMessage[] {
  if (message.role === "user") return [{ role: "user", content: userContent(message) }];
  return message.steps.flatMap(wireStep);
}

/** The text with its files, behind its images where it has some. */
function userContent(message: UserMessage): string | WirePart[] {
  const [text, images] = [withFiles(message), message.images];
  if (!images?.length) return text;
  const parts = images.map((url): WirePart => ({ type: "image_url", image_url: { url } }));
  return text ? [...parts, { type: "text", text }] : parts;
}

function wireStep(step: Step): WireMessage[] {
  if (!step.calls.length) return step.text ? [{ role: "assistant", content: step.text }] : [];
  const calls = step.calls.map((call) => ({
    id: call.id,
    type: "function" as const,
    function: { name: call.name, arguments: call.arguments },
  }));
  const thoughts = step.reasoning ? { reasoning_content: step.reasoning } : {};
  const results = step.calls.map((call): WireMessage => ({ role: "tool", tool_call_id: call.id, content: resultOf(call) }));
  return [{ role: "assistant", content: step.text || null, ...thoughts, tool_calls: calls }, ...results];
}

const resultOf = (call: ToolCall): string => call.result ?? NOT_RUN;
