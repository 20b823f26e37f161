// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { ApiError } from "../src/api/http.ts";
import { readChunk } from "../src/api/readers.ts";
import type { ChatChunk, McpResult, McpTool, ToolCallDelta } from "../src/api/types.ts";
import { StepWriter } from "../src/chat/accumulate.ts";
import { fingerprint, isAlwaysAllowed } from "../src/chat/approval.ts";
import { MAX_FILE, readFile, sizeOf } from "../src/chat/files.ts";
import { chatRequest, type RequestParts } from "../src/chat/request.ts";
import { statisticsOf } from "../src/chat/statistics.ts";
import { MAX_ROUNDS, recover, Turn, type TurnHost } from "../src/chat/turn.ts";
import { type AssistantMessage, emptyStep, type Message } from "../src/chat/types.ts";

type Script = (ChatChunk | Error)[];

const say = (content: string): ChatChunk => ({ choices: [{ index: 0, delta: { content } }] });
const think = (reasoning_content: string): ChatChunk => ({ choices: [{ index: 0, delta: { reasoning_content } }] });
const call = (...tool_calls: ToolCallDelta[]): ChatChunk => ({ choices: [{ index: 0, delta: { tool_calls } }] });
const end = (finish_reason = "stop"): ChatChunk => ({ choices: [{ index: 0, delta: {}, finish_reason }] });
const usage = (prompt: number, completion: number): ChatChunk => ({
  choices: [], usage: { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion, prompt_tokens_details: { cached_tokens: 3 } },
});
const ask = (name: string, args = "{}", id = "c1", index = 0) => call({ index, id, function: { name, arguments: args } });

const tool = (name: string, parameters: Record<string, unknown> = {}): McpTool => ({ type: "function", function: { name, description: "d", parameters }, server: "s", original_name: name, read_only: false });

function stage(...scripts: Script[]) {
  const message: AssistantMessage = { id: "m".repeat(32), role: "assistant", parent: "u", created: 1, model: "m", steps: [], state: "streaming" };
  const seen = { requests: [] as { goOn: boolean }[], calls: [] as { name: string; args: object }[], settled: 0, always: [] as string[] };
  const allowed = new Set<string>();
  const tools = new Map<string, Record<string, unknown>>(); // schemas by name
  let clock = 0;
  let result: (name: string, signal: AbortSignal) => Promise<McpResult> = async (name) => ({ status: "completed", content: [], is_error: false, text: `${name} says hi`, seconds: 0.5 });
  const host: TurnHost = {
    request: (goOn) => ({ goOn }),
    stream: async function* (request, signal) {
      seen.requests.push(request as { goOn: boolean });
      for (const part of scripts.shift() ?? [say("?"), end()]) {
        await Promise.resolve();
        signal.throwIfAborted();
        if (part instanceof Error) throw part;
        yield part;
      }
    },
    callTool: (name, args, signal) => {
      seen.calls.push({ name, args });
      return result(name, signal);
    },
    tool: (name) => (name.startsWith("no") ? undefined : tool(name, tools.get(name))),
    isAllowed: (one) => allowed.has(one.function.name),
    allowAlways: (one) => { allowed.add(one.function.name); seen.always.push(one.function.name); },
    changed: () => undefined,
    settled: () => { seen.settled++; },
    now: () => (clock += 10),
  };
  return { turn: new Turn(message, host), message, seen, allowed, tools, answerTools: (by: typeof result) => (result = by) };
}

test("a plain answer", async () => {
  const { turn, message, seen } = stage([think("hm"), say("Hel"), say("lo"), end(), usage(10, 4)]);
  await turn.run();
  assert.equal(message.state, "done");
  const [step] = message.steps;
  assert.deepEqual([step!.reasoning, step!.text, step!.finish], ["hm", "Hello", "stop"]);
  assert.ok(step!.firstTokenMs! > 0 && step!.totalMs! > step!.firstTokenMs!);
  assert.deepEqual(seen.requests, [{ goOn: false }]);
  const numbers = statisticsOf(message)!;
  assert.deepEqual([numbers.prompt, numbers.cached, numbers.generated], [10, 3, 4]);
});

test("a tool runs only after the user's word, and its result goes back", async () => {
  const { turn, message, seen } = stage([call({ index: 0, id: "c1", function: { name: "time", arguments: '{"zo' } }), call({ index: 0, function: { arguments: 'ne":1}' } }), end("tool_calls")], [say("done"), end()]);
  await turn.run();
  assert.equal(message.state, "waiting");
  assert.equal(message.steps[0]!.calls[0]!.state, "waiting");
  assert.deepEqual(seen.calls, []);
  await turn.decide("c1", "once");
  assert.deepEqual(seen.calls, [{ name: "time", args: { zone: 1 } }]);
  assert.deepEqual([message.state, message.steps.length, message.steps[1]!.text], ["done", 2, "done"]);
  assert.deepEqual([message.steps[0]!.calls[0]!.result, message.steps[0]!.calls[0]!.state], ["time says hi", "done"]);
  assert.deepEqual(seen.always, []);
});

test("a result that is too long for the context is cut until it fits", async () => {
  const full = () => new ApiError({ kind: "http", status: 400, message: "too long", code: "context_length_exceeded" });
  const { turn, message, seen, allowed, answerTools } = stage([ask("read"), end("tool_calls")], [full()], [full()], [say("done"), end()]);
  allowed.add("read");
  answerTools(async () => ({ status: "completed", content: [], is_error: false, text: "\u{1F600}".repeat(1000), seconds: 1 }));
  await turn.run();
  assert.deepEqual([message.state, seen.requests.length, message.steps.length, message.steps[1]!.text], ["done", 4, 2, "done"]);
  assert.equal(message.steps[0]!.calls[0]!.result, "\u{1F600}".repeat(228) + "\n[cut: the whole output has 1000 characters]");
  const short = stage([ask("read"), end("tool_calls")], [full()], [say("never"), end()]);
  short.allowed.add("read");
  await short.turn.run();
  assert.deepEqual([short.message.state, short.message.error?.code, short.seen.requests.length], ["failed", "context_length_exceeded", 2]);
});

test("denied: it does not run and the model is told", async () => {
  const { turn, message, seen } = stage([ask("rm"), end()], [say("ok"), end()]);
  await turn.run();
  await turn.decide("c1", "deny");
  assert.deepEqual(seen.calls, []);
  assert.equal(message.steps[0]!.calls[0]!.state, "denied");
  assert.match(message.steps[0]!.calls[0]!.result!, /did not allow/);
  assert.equal(message.state, "done");
});

test("always: later calls of the tool run by themselves, other tools do not", async () => {
  const { turn, message, seen } = stage([ask("time"), end()], [ask("time"), end()], [ask("other"), end()]);
  await turn.run();
  await turn.decide("c1", "always");
  assert.deepEqual(seen.calls.map((one) => one.name), ["time", "time"]);
  assert.deepEqual([message.state, seen.always], ["waiting", ["time"]]);
});

test("two calls: the answer goes on when both are decided", async () => {
  const { turn, message, seen } = stage([ask("a", "{}", "c1", 0), ask("b", "{}", "c2", 1), end()], [say("both"), end()]);
  await turn.run();
  await turn.decide("c2", "once");
  assert.equal(message.state, "waiting");
  assert.equal(seen.requests.length, 1);
  await turn.decide("c1", "deny");
  assert.deepEqual([message.state, seen.calls.map((one) => one.name)], ["done", ["b"]]);
  await turn.decide("c1", "once");
  assert.equal(seen.calls.length, 1);
});

test("unknown tools and broken arguments are answered without asking", async () => {
  const { turn, message, seen } = stage([ask("nothing", "{}", "c1", 0), ask("time", "{oops", "c2", 1), ask("time", "[1]", "c3", 2), end()], [say("sorry"), end()]);
  await turn.run();
  assert.deepEqual(message.steps[0]!.calls.map((one) => one.state), ["failed", "failed", "failed"]);
  assert.deepEqual([seen.calls.length, message.state], [0, "done"]);
});

test("arguments that do not fit the schema are answered to the model, and nobody is asked", async () => {
  const { turn, message, seen, allowed, tools } = stage([ask("time", '{"zone":5}'), end("tool_calls")], [say("sorry"), end()]);
  tools.set("time", { type: "object", properties: { zone: { type: "string" } }, required: ["zone"] });
  allowed.add("time");
  await turn.run();
  const [call] = message.steps[0]!.calls;
  assert.deepEqual([call!.state, call!.result], ["failed", "The arguments do not fit the tool's schema: zone: 5 is not of type 'string'"]);
  assert.deepEqual([seen.calls.length, seen.requests.length, message.state], [0, 2, "done"]);
});

test("calls of an answer that was cut do not run, whole ones neither", async () => {
  const { turn, message, seen, allowed } = stage([ask("a", "{}", "c1", 0), ask("b", '{"x', "c2", 1), end("length")], [say("on"), end()]);
  allowed.add("a");
  await turn.run();
  assert.deepEqual([message.state, seen.calls.length, seen.requests.length], ["done", 0, 1]);
  assert.deepEqual(message.steps[0]!.calls.map((one) => [one.state, one.result]), [
    ["failed", "The answer was cut at its token limit behind this call, so it did not run."],
    ["failed", "The answer was cut at its token limit within this call. It did not run."],
  ]);
  await turn.run(true);
  assert.deepEqual([message.state, message.steps.at(-1)!.text, seen.calls.length], ["done", "on", 0]);
  const strange = stage([ask("a", "{}"), end("content_filter")]);
  strange.allowed.add("a");
  await strange.turn.run();
  assert.deepEqual([strange.message.state, strange.seen.calls.length, strange.message.steps[0]!.calls[0]!.state], ["done", 0, "failed"]);
  const endless = stage([ask("a", "{}")]);
  endless.allowed.add("a");
  await endless.turn.run();
  assert.deepEqual([endless.message.state, endless.seen.calls.length], ["done", 0]);
});

test("a tool that fails, and one that cannot be reached", async () => {
  const { turn, message, answerTools } = stage([ask("a", "{}", "c1", 0), ask("b", "{}", "c2", 1), end()], [say("x"), end()]);
  answerTools(async (name) => {
    if (name === "b") throw new ApiError({ kind: "http", status: 500, message: "broken" });
    return { status: "failed", content: [], is_error: true, text: "bad input", seconds: 1 };
  });
  await turn.run();
  await turn.decide("c1", "once");
  await turn.decide("c2", "once");
  assert.deepEqual(message.steps[0]!.calls.map((one) => [one.state, one.result]), [["failed", "bad input"], ["failed", "The tool could not be run: broken"]]);
  assert.equal(message.state, "done");
});

test("a server that calls no tools for this page: the call still waits, and the model is not told", async () => {
  const { turn, message, seen, answerTools } = stage([ask("a"), end()]);
  answerTools(async () => {
    throw new ApiError({ kind: "http", status: 403, message: "start it with --api-key" });
  });
  await turn.run();
  await turn.decide("c1", "once");
  assert.deepEqual([message.state, message.steps[0]!.calls[0]!.state, message.error?.message], ["waiting", "waiting", "start it with --api-key"]);
  assert.deepEqual([message.steps[0]!.calls[0]!.result, seen.requests.length], [undefined, 1]);
});

test("stop in the middle keeps what there is", async () => {
  const { turn, message } = stage([say("one "), say("two "), say("three"), end()]);
  const running = turn.run();
  await new Promise((resolve) => setTimeout(() => { turn.stop(); resolve(undefined); }));
  await running;
  assert.ok(["stopped", "done"].includes(message.state));
  const slow = stage([say("one "), new DOMException("stopped", "AbortError")]);
  await slow.turn.run();
  assert.deepEqual([slow.message.state, slow.message.steps[0]!.text, slow.message.error], ["stopped", "one ", undefined]);
});

test("stop while a tool runs: its outcome is not known", async () => {
  const { turn, message, answerTools } = stage([ask("a"), end()]);
  answerTools((_, signal) => new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(new DOMException("", "AbortError")))));
  await turn.run();
  const deciding = turn.decide("c1", "once");
  await new Promise((resolve) => setTimeout(resolve));
  turn.stop();
  await deciding;
  assert.deepEqual([message.steps[0]!.calls[0]!.state, message.state], ["unknown", "stopped"]);
});

test("stop while a call waits denies it", async () => {
  const { turn, message } = stage([ask("a"), end()]);
  await turn.run();
  turn.stop();
  assert.deepEqual([message.state, message.steps[0]!.calls[0]!.state], ["stopped", "denied"]);
});

test("a lost connection keeps the partial answer; continuing appends to it", async () => {
  const { turn, message, seen } = stage([say("one "), usage(5, 2), new ApiError({ kind: "dropped", message: "" })], [say("two"), end(), usage(7, 3)]);
  await turn.run();
  assert.deepEqual([message.state, message.steps[0]!.text, message.error?.kind], ["failed", "one ", "dropped"]);
  await turn.run(true);
  assert.deepEqual([message.state, message.steps.length, message.steps[0]!.text, message.error], ["done", 1, "one two", undefined]);
  assert.deepEqual(seen.requests, [{ goOn: false }, { goOn: true }]);
  assert.deepEqual([message.steps[0]!.usage!.prompt_tokens, message.steps[0]!.usage!.completion_tokens], [5, 5]);
});

test("an answer that a reload cut and that goes on is as fast as it was", () => {
  const chunk = (content: string, tokens: number) => ({ choices: [{ index: 0, delta: { content } }], usage: { prompt_tokens: 5, completion_tokens: tokens, total_tokens: 5 + tokens } }) as ChatChunk;
  const step = emptyStep();
  const first = new StepWriter(step, 0);
  first.add(chunk("a", 1), 100);
  first.add(chunk("b", 101), 10_100); // 10 tokens a second; then the page goes away
  const second = new StepWriter(step, 50_000);
  second.add(chunk("c", 10), 51_000);
  second.close(51_000);
  const { tokensPerSecond, generated } = statisticsOf({ id: "a", role: "assistant", parent: null, created: 1, model: "m", state: "done", steps: [step] })!;
  assert.deepEqual([generated, Math.round(tokensPerSecond!)], [111, 10]);
});

test("guesses are added up over requests and steps, also where one was cut before its counts", async () => {
  const counted = (draft_tokens: number, accepted_draft_tokens: number, reasoning_tokens: number) => readChunk({
    choices: [], usage: { prompt_tokens: 5, completion_tokens: 9, completion_tokens_details: { draft_tokens, accepted_draft_tokens, reasoning_tokens } },
  })!;
  const { turn, message } = stage(
    [ask("a"), end("tool_calls"), counted(4, 1, 2)],
    [say("one "), usage(5, 2), new ApiError({ kind: "dropped", message: "" })],
    [say("two "), usage(5, 1), end("length"), counted(10, 7, 3)],
    [say("three"), usage(5, 1), end(), counted(5, 5, 0)],
  );
  const guesses = () => Object.entries(statisticsOf(message)!).filter(([name]) => ["guessed", "accepted", "reasoning"].includes(name)).map(([, count]) => count);
  await turn.run();
  assert.deepEqual(guesses(), [2, 4, 1]);
  await turn.decide("c1", "once");
  assert.deepEqual([message.state, guesses()], ["failed", [2, 4, 1]]);
  await turn.run(true);
  assert.deepEqual([message.state, guesses()], ["done", [5, 14, 8]]);
  await turn.run(true);
  assert.deepEqual([message.steps.length, message.steps[1]!.text, guesses()], [2, "one two three", [5, 19, 13]]);
});

test("an error before the first token: trying again begins anew", async () => {
  const { turn, message, seen } = stage([new ApiError({ kind: "http", status: 503, message: "full" })], [say("yes"), end()]);
  await turn.run();
  assert.deepEqual([message.state, message.error?.message], ["failed", "full"]);
  await turn.run(true);
  assert.deepEqual([message.state, message.steps.length, message.steps[0]!.text], ["done", 1, "yes"]);
  assert.deepEqual(seen.requests[1], { goOn: false });
});

test("a call that was cut off is dropped", async () => {
  const { turn, message, seen } = stage([say("Let me "), ask("a", '{"x'), new ApiError({ kind: "dropped", message: "" })]);
  await turn.run();
  assert.deepEqual([message.steps[0]!.calls, seen.calls], [[], []]);
});

test("a model that calls without end is paused", async () => {
  const { turn, message, seen, allowed } = stage(...Array.from({ length: 40 }, () => [ask("a"), end()]));
  allowed.add("a");
  await turn.run();
  assert.deepEqual([message.state, seen.requests.length], ["stopped", MAX_ROUNDS]);
  await turn.run(true);
  assert.equal(seen.requests.length, 2 * MAX_ROUNDS);
});

test("after a reload nothing runs by itself", () => {
  const base: AssistantMessage = {
    id: "m", role: "assistant", parent: null, created: 1, model: "", state: "streaming",
    steps: [{ reasoning: "", text: "hi", calls: [
      { id: "1", name: "a", arguments: "{}", state: "running" }, { id: "2", name: "b", arguments: "{", state: "writing" }, { id: "3", name: "c", arguments: "{}", state: "approved" },
    ] }],
  };
  const recovered = recover(base);
  assert.deepEqual([recovered.state, recovered.steps[0]!.calls.map((one) => one.state)], ["waiting", ["unknown", "waiting"]]);
  assert.equal(recover({ ...base, steps: [{ reasoning: "", text: "hi", calls: [] }] }).state, "stopped");
  const done: AssistantMessage = { ...base, state: "done" };
  assert.equal(recover(done), done);
});

test("permission is for the tool as it was", () => {
  const before = tool("a");
  const allowed = { a: fingerprint(before) };
  assert.ok(isAlwaysAllowed(before, allowed));
  assert.ok(!isAlwaysAllowed({ ...before, function: { ...before.function, description: "other" } }, allowed));
  assert.ok(!isAlwaysAllowed({ ...before, server: "other" }, allowed));
  assert.ok(!isAlwaysAllowed(tool("constructor"), allowed));
});

test("files go behind the text, each as a block of code", () => {
  const path: Message[] = [{
    id: "u", role: "user", parent: null, created: 1, text: "Why?", images: ["data:image/png;base64,AA=="],
    files: [{ name: "a.py", text: "x = 1\n" }, { name: "fence", text: "```\nin it" }],
  }];
  const content = "Why?\n\na.py:\n```py\nx = 1\n```\n\nfence:\n````\n```\nin it\n````";
  const sent = (changes: object) => {
    const request = chatRequest({ model: "m", path: path.map((one) => ({ ...one, ...changes }) as Message), settings: {}, tools: [], goOn: false });
    return (request.messages as { content: unknown }[]).map((one) => one.content);
  };
  assert.deepEqual(sent({}), [[{ type: "image_url", image_url: { url: "data:image/png;base64,AA==" } }, { type: "text", text: content }]]);
  assert.deepEqual(sent({ images: undefined }), [content]);
  assert.deepEqual(sent({ images: undefined, text: "" }), [content.slice("Why?\n\n".length)]);
});

test("what is no text is not taken as a file", async () => {
  const read = (name: string, ...parts: BlobPart[]) => readFile(new File(parts, name));
  assert.deepEqual(await read("note.txt", "Grüße"), { name: "note.txt", text: "Grüße" });
  const faults: [BlobPart, string][] = [
    ["", "empty"], ["x".repeat(MAX_FILE + 1), "tooLarge"], ["%PDF-1.4\nall of it ASCII", "pdf"], ["a\0b", "binary"],
    [new Uint8Array([0x47, 0x72, 0xfc, 0xdf, 0x65]), "notUtf8"], [new Uint8Array([0xff, 0xfe, 0x61, 0]), "notUtf8"],
  ];
  for (const [part, fault] of faults) assert.equal(await read("a", part), fault);
  assert.equal(sizeOf({ name: "", text: "Grüße" }), 7);
});

test("a branch as a request", () => {
  const message: AssistantMessage = {
    id: "m", role: "assistant", parent: "u", created: 2, model: "", state: "done",
    steps: [
      { reasoning: "r", text: "", calls: [{ id: "c", name: "a", arguments: "{}", state: "done", result: "42" }, { id: "d", name: "a", arguments: "{}", state: "waiting" }] },
      { reasoning: "r2", text: "It is 42", calls: [] },
    ],
  };
  const parts: RequestParts = {
    model: "m", path: [{ id: "u", role: "user", parent: null, created: 1, text: "what" }, message],
    settings: { system: "be good", temperature: 0.5, stop: ["x"], schema: '{"type":"object"}', logprobs: true, thinking: false }, tools: [tool("a")], goOn: true,
  };
  const request = chatRequest(parts);
  assert.deepEqual(request.messages, [
    { role: "system", content: "be good" },
    { role: "user", content: "what" },
    { role: "assistant", content: null, reasoning_content: "r", tool_calls: [{ id: "c", type: "function", function: { name: "a", arguments: "{}" } }, { id: "d", type: "function", function: { name: "a", arguments: "{}" } }] },
    { role: "tool", tool_call_id: "c", content: "42" },
    { role: "tool", tool_call_id: "d", content: "The user did not approve this call; the tool was not run." },
    { role: "assistant", content: "It is 42" },
  ]);
  const { messages: _, ...fields } = request;
  assert.deepEqual(fields, {
    model: "m", stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, return_draft_counts: true, return_progress: true, temperature: 0.5, stop: ["x"], enable_thinking: false, logprobs: true, top_logprobs: 5,
    continue_final_message: true, add_generation_prompt: false, tools: [{ type: "function", function: { name: "a", description: "d", parameters: {} } }],
  });
  // The rest of an answer is not a whole one by the schema.
  assert.deepEqual(chatRequest({ ...parts, goOn: false }).response_format, { type: "json_schema", json_schema: { name: "answer", schema: { type: "object" } } });
});
