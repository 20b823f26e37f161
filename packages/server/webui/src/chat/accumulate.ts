// SPDX-License-Identifier: MIT
// The chunks of a stream -> one step of an answer.

import { OUTPUT_COUNTS } from "../api/readers.ts";
import type { ChatChunk, ToolCallDelta, Usage } from "../api/types.ts";
import type { AssistantMessage, Step } from "./types.ts";

/** Adds chunks to a step and takes its times; `now` is in milliseconds. */
export class StepWriter {
  private thinkingSince: number | undefined;
  private readonly before: Pick<Step, "reasoningMs" | "totalMs" | "usage">;

  constructor(
    readonly step: Step,
    private readonly started: number,
  ) {
    this.before = { ...step };
  }

  add(chunk: ChatChunk, now: number): void {
    this.close(now); // time and tokens are kept together, also where the page goes away before the end
    if (chunk.usage) this.step.usage = summed(this.before.usage, chunk.usage);
    const choice = chunk.choices.find((one) => one.index === 0);
    if (!choice) return;
    const { delta } = choice;
    const thought = delta.reasoning_content;
    if (chunk.read !== undefined) this.step.read = chunk.read;
    else delete this.step.read;
    if (thought || delta.content || delta.tool_calls?.length) this.step.firstTokenMs ??= now - this.started;
    if (thought) {
      this.thinkingSince ??= now;
      this.step.reasoning += thought;
      this.step.reasoningMs = (this.before.reasoningMs ?? 0) + now - this.thinkingSince;
    }
    if (delta.content) this.step.text += delta.content;
    for (const call of delta.tool_calls ?? []) this.addCall(call);
    if (choice.logprobs?.content?.length) (this.step.logprobs ??= []).push(...choice.logprobs.content);
    if (choice.finish_reason) this.step.finish = choice.finish_reason;
  }

  /** The time until now; at last, however the step ended. */
  close(now: number): void {
    this.step.totalMs = (this.before.totalMs ?? 0) + now - this.started;
  }

  private addCall({ index, id, function: called }: ToolCallDelta): void {
    const call = (this.step.calls[index] ??= { id: "", name: "", arguments: "", state: "writing" });
    if (id) call.id = id;
    if (called?.name) call.name += called.name;
    if (called?.arguments) call.arguments += called.arguments;
  }
}

// An answer that was continued has the prompt of its last request and the output of all of them.
function summed(before: Usage | undefined, now: Usage): Usage {
  if (!before) return now;
  const sum: Usage = { ...now, completion_tokens: before.completion_tokens + now.completion_tokens };
  sum.prompt_tokens = before.prompt_tokens;
  sum.total_tokens = sum.prompt_tokens + sum.completion_tokens;
  for (const name of OUTPUT_COUNTS) {
    const counts = [before, now].flatMap((one) => one.completion_tokens_details?.[name] ?? []);
    if (counts.length) sum.completion_tokens_details = { ...sum.completion_tokens_details, [name]: counts.reduce((all, one) => all + one) };
  }
  if (now.completion_time_costs !== undefined && before.completion_time_costs !== undefined) {
    sum.completion_time_costs = before.completion_time_costs + now.completion_time_costs;
  } else {
    delete sum.completion_time_costs;
  }
  return sum;
}

/** A copy whose changed parts are new objects; texts are shared. */
export function snapshot(draft: AssistantMessage): AssistantMessage {
  const last = draft.steps.length - 1;
  return {
    ...draft,
    steps: draft.steps.map((step, index) =>
      index < last ? step : { ...step, calls: step.calls.map((call) => ({ ...call })) },
    ),
  };
}
