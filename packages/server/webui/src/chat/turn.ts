// SPDX-License-Identifier: MIT
// One answer from the first request to the last: stream, tool calls, results, next stream.
//
// All that a turn knows stands in its message, so that a page that was reloaded can take it up again.

import { errorInfo, isAbort, isRefusal, sayable } from "../api/http.ts";
import type { ChatChunk, McpResult, McpTool } from "../api/types.ts";
import { StepWriter } from "./accumulate.ts";
import { readArguments } from "./arguments.ts";
import { type AssistantMessage, emptyStep, isWhole, type Step, type ToolCall } from "./types.ts";

export const MAX_ROUNDS = 16; // requests of one turn before it pauses
export const MAX_CALLS = 32; // of one step
const CUT = "The answer was cut at its token limit within this call. It did not run.";
const WHOLE = "The answer was cut at its token limit behind this call, so it did not run.";
const BROKEN = "The answer did not come to its end, so this call did not run.";
const MAX_RESULT = 100_000; // characters of a result that the model sees
const LEAST_RESULT = 200; // characters to which a result may be cut if the context is too small
const NOTE = /\n\[cut: the whole output has [0-9]+ characters\]$/;

export type Decision = "once" | "always" | "deny";

/** What a turn needs of its surroundings. */
export interface TurnHost {
  request(goOn: boolean): object;
  stream(request: object, signal: AbortSignal): AsyncIterable<ChatChunk>;
  callTool(name: string, args: object, signal: AbortSignal): Promise<McpResult>;
  tool(name: string): McpTool | undefined;
  isAllowed(tool: McpTool): boolean;
  allowAlways(tool: McpTool): void;
  changed(): void; // the message is not what it was
  settled(): void; // and will stay so for a while
  now(): number; // milliseconds
}

export class Turn {
  private abort = new AbortController();
  private active = false;

  constructor(
    readonly message: AssistantMessage,
    private readonly host: TurnHost,
  ) {}

  get isActive(): boolean {
    return this.active;
  }

  /** Writes the answer; with `goOn` the last step's text is continued. Never throws. */
  async run(goOn = false): Promise<void> {
    await this.guarded(async () => {
      const last = this.message.steps.at(-1);
      const continues = goOn && !!last?.text && !last.calls.length;
      if (last && !last.calls.length && !continues) this.message.steps.pop();
      await this.rounds(continues);
    });
  }

  /** The user's word on a call. When no call waits any more, the approved ones run and the answer goes on. */
  async decide(callId: string, decision: Decision): Promise<void> {
    const call = this.message.steps.at(-1)?.calls.find((one) => one.id === callId);
    if (!call || call.state !== "waiting") return;
    const tool = this.host.tool(call.name);
    if (decision === "always" && tool) this.host.allowAlways(tool);
    if (decision === "deny") deny(call);
    else call.state = "approved";
    if (decision === "always") this.approveAllowed();
    this.host.changed();
    if (this.active) return;
    await this.guarded(() => this.rounds(false));
  }

  /** Ends what runs. A tool that was running may have done its work. */
  stop(): void {
    this.abort.abort();
    if (!this.active && this.message.state === "waiting") {
      for (const call of this.message.steps.at(-1)?.calls ?? []) if (call.state === "waiting") deny(call);
      this.message.state = "stopped";
      this.host.changed();
      this.host.settled();
    }
  }

  private async guarded(work: () => Promise<void>): Promise<void> {
    if (this.active) return;
    this.active = true;
    this.abort = new AbortController();
    this.message.state = "streaming";
    delete this.message.error;
    try {
      await work();
    } catch (error) {
      this.message.state = isAbort(error) ? "stopped" : "failed";
      if (!isAbort(error)) this.message.error = errorInfo(error);
      closeCalls(this.message);
      if (this.message.steps.at(-1)?.calls.some((call) => call.state === "waiting")) this.message.state = "waiting";
    } finally {
      this.active = false;
      this.host.changed();
      this.host.settled();
    }
  }

  private async rounds(goOn: boolean): Promise<void> {
    for (let round = 0; round < MAX_ROUNDS; round++) {
      const pending = this.message.steps.at(-1)?.calls ?? [];
      if (!goOn && pending.length && !(await this.runCalls(pending))) {
        this.message.state = "waiting";
        return;
      }
      const step = await this.oneStep(goOn);
      goOn = false;
      if (!step.calls.length || !isWhole(step)) {
        this.message.state = "done";
        return;
      }
    }
    this.message.state = "stopped";
  }

  private async oneStep(goOn: boolean): Promise<Step> {
    const step = goOn ? this.message.steps.at(-1)! : emptyStep();
    delete step.finish;
    if (!goOn) this.message.steps.push(step);
    const writer = new StepWriter(step, this.host.now());
    this.host.changed();
    try {
      for (let accepted = false; !accepted; ) {
        try {
          for await (const chunk of this.host.stream(this.host.request(goOn), this.abort.signal)) {
            writer.add(chunk, this.host.now());
            this.host.changed();
          }
          accepted = true;
        } catch (error) {
          if (errorInfo(error).code !== "context_length_exceeded" || !this.shorten()) throw error;
        }
      }
    } finally {
      writer.close(this.host.now());
    }
    step.calls = step.calls.filter((call) => call?.name).slice(0, MAX_CALLS);
    for (const [index, call] of step.calls.entries()) this.admit(call, index, step);
    this.approveAllowed();
    this.host.settled();
    return step;
  }

  /** Cuts the results of this answer to half of the longest one's length; false if all are short. */
  private shorten(): boolean {
    const calls = this.message.steps.flatMap((step) => step.calls);
    const most = Math.floor(Math.max(0, ...calls.map((call) => call.result?.length ?? 0)) / 2);
    if (most < LEAST_RESULT) return false;
    for (const call of calls) if (call.result) call.result = cut(call.result, most);
    return true;
  }

  /** A call that was written to its end: one that cannot run is answered at once, the others wait. */
  private admit(call: ToolCall, index: number, step: Step): void {
    call.id ||= `call_${this.message.id.slice(0, 8)}_${this.message.steps.length}_${index}`;
    const tool = this.host.tool(call.name);
    const given = readArguments(call.arguments, tool?.function.parameters);
    if (!isWhole(step)) fail(call, step.finish !== "length" ? BROKEN : call.arguments.trim() && typeof readArguments(call.arguments, {}) === "object" ? WHOLE : CUT);
    else if (!tool) fail(call, `There is no tool named ${call.name}.`);
    else if (typeof given === "string") fail(call, given);
    else call.state = "waiting";
  }

  private approveAllowed(): void {
    for (const call of this.message.steps.at(-1)?.calls ?? []) {
      const tool = this.host.tool(call.name);
      if (call.state === "waiting" && tool && this.host.isAllowed(tool)) call.state = "approved";
    }
  }

  /** Runs what is approved; true when every call has a result. */
  private async runCalls(calls: ToolCall[]): Promise<boolean> {
    for (;;) {
      const ready = calls.filter((call) => call.state === "approved");
      if (!ready.length) break;
      await Promise.all(ready.map((call) => this.runCall(call)));
      this.abort.signal.throwIfAborted();
    }
    return calls.every((call) => call.state !== "waiting");
  }

  private async runCall(call: ToolCall): Promise<void> {
    const started = this.host.now();
    call.state = "running";
    this.host.changed();
    try {
      const result = await this.host.callTool(call.name, argumentsOf(call), this.abort.signal);
      call.state = result.is_error || result.status !== "completed" ? "failed" : "done";
      call.result = cut(result.text || "(no output)", MAX_RESULT);
      call.content = result.content;
      call.seconds = result.seconds;
    } catch (error) {
      if (isRefusal(error)) {
        call.state = "waiting"; // it did not run, and what is wrong is for the user and not for the model
        throw error;
      }
      call.seconds = (this.host.now() - started) / 1000;
      if (isAbort(error)) lose(call);
      else fail(call, `The tool could not be run: ${sayable(errorInfo(error).message) || "the server did not answer"}`);
    }
    this.host.changed();
    this.host.settled();
  }
}

/** After a reload: what was going on when the page went away is over, and said to be. */
export function recover(message: AssistantMessage): AssistantMessage {
  if (message.state !== "streaming") return message;
  const recovered: AssistantMessage = structuredClone(message);
  const waits = recovered.steps.at(-1)?.calls.some((call) => call.state === "waiting" || call.state === "approved");
  closeCalls(recovered);
  recovered.state = waits ? "waiting" : "stopped";
  return recovered;
}

/** Calls that were being written when the stream ended are gone; those that ran are of unknown outcome. */
function closeCalls(message: AssistantMessage): void {
  const step = message.steps.at(-1);
  if (!step) return;
  step.calls = step.calls.filter((call) => call && call.state !== "writing");
  for (const call of step.calls) {
    if (call.state === "running") lose(call);
    if (call.state === "approved") call.state = "waiting";
  }
}

/** A text of at most `most` UTF-16 units, which ends with a note of its whole length, also if it was cut before. */
function cut(text: string, most: number): string {
  if (text.length <= most) return text;
  const note = NOTE.exec(text)?.[0] ?? `\n[cut: the whole output has ${[...text].length} characters]`;
  return text.slice(0, most - note.length).replace(/[\uD800-\uDBFF]$/, "") + note; // no half of a character
}

function argumentsOf(call: ToolCall): object {
  const given = readArguments(call.arguments, {});
  return typeof given === "string" ? {} : given; // it was admitted: they can be read
}

function fail(call: ToolCall, why: string): void {
  call.state = "failed";
  call.result = why;
}

function deny(call: ToolCall): void {
  call.state = "denied";
  call.result = "The user did not allow this call; the tool was not run.";
}

function lose(call: ToolCall): void {
  call.state = "unknown";
  call.result = "The call was interrupted; the tool may have run or not.";
}
