// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { isSameModel, readChunk, readInventory, readModel, readResult, readServer, readShown, readTool, underBases } from "../src/api/readers.ts";
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

test("an inventory is read field by field", () => {
  for (const one of RUBBISH) assert.deepEqual([readInventory(one), readShown(one)], [undefined, {}]);
  const model = { id: "m", size: 5, needed: null, fits: "now", removable: true };
  const known = { name: "k", model: "o/k", needed: 7, fits: "never", served: null };
  const pull = { model: "p", state: "failed", done: 1, total: 2, needed: 3, fits: "alone", failure: "damaged", error: "why" };
  const right = { changes: true, memory_free: 9, disk_free: 8, models: [model], known: [known], pulls: [pull] };
  assert.deepEqual(readInventory(right), { changes: true, memoryFree: 9, diskFree: 8, models: [model], known: [known], pulls: [pull] });
  const odd = { models: [null, { id: 5 }, { id: "m", size: -1, removable: "yes" }], known: 5, pulls: [{ model: "p", done: "x" }], changes: 1 };
  assert.deepEqual(readInventory(odd), {
    changes: false, memoryFree: 0, diskFree: 0, models: [{ id: "m", size: 0, needed: null, fits: null, removable: false }], known: [],
    pulls: [{ model: "p", state: "", done: 0, total: 0, needed: 0, fits: null, failure: "", error: "" }],
  });
  assert.deepEqual(
    readShown({ details: { quantization_level: "Q4_K" }, model_info: { "general.architecture": "llama", "general.parameter_count": 3, "llama.context_length": "x" } }),
    { architecture: "llama", quantization: "Q4_K", num_parameters: 3 },
  );
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
  const details = { draft_tokens: "x", accepted_draft_tokens: 3, reasoning_tokens: null, other: 1 };
  const { usage } = readChunk({ choices: [], usage: { prompt_tokens: 1, completion_tokens: 2, completion_tokens_details: details } })!;
  assert.deepEqual(usage!.completion_tokens_details, { accepted_draft_tokens: 3 });
});

test("how much of the prompt is read is shown until the first token", () => {
  const step = emptyStep();
  const writer = new StepWriter(step, 0);
  const shares = [[0, 80], [64, 80], [90, 80], ["x", 80], [1, 0]].map(([processed, total]) => {
    writer.add(readChunk({ choices: [{ index: 0, delta: {} }], prompt_progress: { processed, total } })!, 1);
    return step.read;
  });
  assert.deepEqual(shares, [0, 0.8, 1, undefined, undefined]);
  writer.add({ choices: [{ index: 0, delta: {} }], read: 0.5 }, 2);
  assert.deepEqual([step.read, step.firstTokenMs], [0.5, undefined]);
  writer.add(readChunk({ choices: [{ index: 0, delta: { role: "assistant", content: "" } }] })!, 3);
  assert.equal("read" in step, false);
});

test("two models of the same files are not names of one", () => {
  const of = (id: string, more: object) => readModel({ id, root: "r", default: false, status: "ready", created: 5, default_sampling: { top_k: 1 }, ...more })[0]!;
  const [one, alias] = [of("a", {}), of("b", {})];
  assert.ok(isSameModel(one, alias));
  for (const other of [{ default_sampling: { top_k: 2 } }, { created: 6 }, { parent: "a" }, { status: "unloaded", root: "a" }]) assert.ok(!isSameModel(one, of("b", other)));
});

test("adapters stand behind their models, and have what is known of these", () => {
  const cards = [
    { id: "a", root: "a", default: true, status: "ready", max_model_len: 8 }, { id: "b", default: false, status: "unloaded" },
    { id: "tone", root: "tone", parent: "a", default: false, status: "ready" },
    { id: "lost", parent: "gone", default: false, status: "ready" },
  ].flatMap(readModel);
  const arranged = underBases(cards);
  assert.deepEqual(arranged.map(({ id }) => id), ["a", "tone", "b", "lost"]);
  assert.deepEqual(arranged[1], { id: "tone", root: "tone", parent: "a", default: false, status: "ready", max_model_len: 8 });
});
