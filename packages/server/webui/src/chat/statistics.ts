// SPDX-License-Identifier: MIT
// Numbers under an answer, summed over its steps.

import type { AssistantMessage, Step } from "./types.ts";

export interface Statistics {
  prompt: number;
  cached: number;
  generated: number;
  reasoning: number;
  guessed: number; // tokens that were tried before the model had said them
  accepted: number; // tokens of the answer that came of them
  firstTokenMs: number | undefined;
  tokensPerSecond: number | undefined;
  seconds: number;
}

export function statisticsOf(message: AssistantMessage): Statistics | undefined {
  const counted = message.steps.filter((step) => step.usage);
  if (!counted.length) return undefined;
  const sum = (value: (step: Step) => number) => counted.reduce((all, step) => all + value(step), 0);
  const last = counted[counted.length - 1]!;
  const generating = sum((step) => generationMs(step) ?? 0);
  const measured = counted.filter((step) => generationMs(step) !== undefined);
  const after = measured.reduce((all, step) => all + step.usage!.completion_tokens - 1, 0);
  return {
    prompt: last.usage!.prompt_tokens,
    cached: last.usage!.prompt_tokens_details?.cached_tokens ?? 0,
    generated: sum((step) => step.usage!.completion_tokens),
    reasoning: sum((step) => step.usage!.completion_tokens_details?.reasoning_tokens ?? 0),
    guessed: sum((step) => step.usage!.completion_tokens_details?.draft_tokens ?? 0),
    accepted: sum((step) => step.usage!.completion_tokens_details?.accepted_draft_tokens ?? 0),
    firstTokenMs: message.steps[0]!.firstTokenMs,
    tokensPerSecond: after > 0 && generating > 0 ? (after * 1000) / generating : undefined,
    seconds: sum((step) => step.totalMs ?? 0) / 1000,
  };
}

/** From the first token to the last: the server's own time where it gave one. */
function generationMs(step: Step): number | undefined {
  const counted = step.usage?.completion_time_costs;
  if (counted !== undefined && counted > 0) return counted;
  if (step.totalMs === undefined || step.firstTokenMs === undefined) return undefined;
  return step.totalMs > step.firstTokenMs ? step.totalMs - step.firstTokenMs : undefined;
}

/** Tokens that the context holds after an answer. */
export function contextTokens(message: AssistantMessage): number | undefined {
  for (let at = message.steps.length - 1; at >= 0; at--) {
    const usage = message.steps[at]!.usage;
    if (usage) return usage.total_tokens;
  }
  return undefined;
}
