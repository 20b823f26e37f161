import assert from "node:assert/strict";
import { test } from "node:test";
import { readChunk, readModel, readResult, readServer, readTool } from "../src/api/readers.ts";
import { StepWriter } from "../src/chat/accumulate.ts";
import { emptyStep } from "../src/chat/types.ts";

const RUBBISH: unknown[] = [null, 1, "x", [], {}, { id: 1 }, { name: {} }, { function: null }, { choices: 5 }];

test("rubbish is left out", () => {
  for (const one of RUBBISH) {
    assert.deepEqual([readModel(one), readServer(one), readTool(one), readChunk(one)], [[], [], [], undefined]);
    assert.deepEqual(readResult(one), { status: "failed", content: [], is_error: true, text: "", seconds: 0 });
  }
});

test("what is right comes through", () => {
  const card = { id: "m", status: "ready", default: true, root: "r", max_model_len: 5, tool_parser: null, reasoning_parser: "think", default_sampling: { top_k: 40 } };
  assert.deepEqual(readModel({ ...card, object: "model", default_sampling: { top_k: 40, top_p: "a" } }), [card]);
  const tool = { type: "function", function: { name: "n", description: "d", parameters: { type: "object" } }, server: "s", original_name: "o", read_only: true };
  assert.deepEqual(readTool(tool), [tool]);
  const server = { name: "s", transport: "stdio", state: "ready", error: null, protocol_version: "1", reconnects: 2, log: ["a"] };
  assert.deepEqual(readServer({ ...server, tools_count: 1, log: ["a", 5] }), [server]);
});

test("a call stands at an index of the list, and at nothing else", () => {
  const step = emptyStep();
  const writer = new StepWriter(step, 0);
  for (const index of ["__proto__", "length", -1, 0.5, 4294967294, null, 0]) {
    const call = { index, id: "polluted", function: { name: "n", arguments: "{}" } };
    writer.add(readChunk({ choices: [{ index: 0, delta: { tool_calls: [call] } }] })!, 1);
  }
  assert.deepEqual(step.calls, [{ id: "polluted", name: "n", arguments: "{}", state: "writing" }]);
  assert.equal("id" in [], false);
});

test("chunks with parts of other kinds", () => {
  const step = emptyStep();
  const writer = new StepWriter(step, 0);
  const choices: unknown[] = [null, { index: 0 }, { index: 0, delta: { content: { a: 1 }, reasoning_content: 5 } }, { index: 0, delta: { content: "ok" }, logprobs: { content: [null, { token: 1 }] } }];
  for (const choice of choices) writer.add(readChunk({ choices: [choice], usage: { prompt_tokens: "x", completion_tokens: {} } })!, 1);
  assert.deepEqual([step.text, step.reasoning, step.usage, step.logprobs], ["ok", "", undefined, undefined]);
});
