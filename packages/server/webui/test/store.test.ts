// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { rate, sampleOf, valuesOf } from "../src/api/metrics.ts";
import { merged, RANGES, readNumber, readSettings, served, wireFields } from "../src/chat/settings.ts";
import type { AssistantMessage, Conversation, Folder, Prompt, UserMessage } from "../src/chat/types.ts";
import { de } from "../src/i18n/de.ts";
import { en } from "../src/i18n/en.ts";
import { formatSeconds, language } from "../src/i18n/index.ts";
import { MemoryStore } from "../src/store/database.ts";
import { readConversation, readFolder, readPrompt } from "../src/store/records.ts";
import { type Archive, exportText, ImportError, importText, missing, newPrompts, Places } from "../src/store/transfer.ts";

const conversation: Conversation = { id: "c", title: "Title", renamed: true, created: 1, updated: 2, model: "m", settings: { temperature: 0.5, system: "s" }, leaf: "a2", pinned: true, folder: "f".repeat(32) };
const folder: Folder = { id: "f".repeat(32), name: "Work", created: 5, isOpen: true };
const prompt: Prompt = { id: "b".repeat(32), name: "Sum up", kind: "message", text: "Sum up {{text}}", updated: 5 };
const question: UserMessage = { id: "u", role: "user", parent: null, created: 1, text: "q <script>" };
const answer = (id: string, created: number): AssistantMessage => ({
  id, role: "assistant", parent: "u", created, model: "m", state: "done",
  steps: [{ reasoning: "r", reasoningMs: 5, text: "t", finish: "stop", firstTokenMs: 1, totalMs: 2, calls: [{ id: "x", name: "tool", arguments: "{}", state: "done", result: "ok", seconds: 1, content: [{ kind: "text", text: "ok" }] }],
    usage: { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3, prompt_tokens_details: { cached_tokens: 1 }, completion_tokens_details: { draft_tokens: 2, accepted_draft_tokens: 1 } }, logprobs: [{ token: "t", logprob: -0.1, top_logprobs: [] }] }],
});

test("export and import keep everything but the ids", () => {
  const text = exportText({ folders: [folder], prompts: [prompt], archives: [{ conversation, messages: [question, answer("a1", 2), answer("a2", 3)] }] });
  const { archives, folders, prompts, broken } = importText(text);
  assert.deepEqual([archives.length, folders, prompts, broken], [1, [folder], [prompt], 0]);
  const { conversation: read, messages } = archives[0]!;
  const [u, a1, a2] = messages;
  assert.deepEqual([a1!.parent, a2!.parent, read.leaf], [u!.id, u!.id, a2!.id]);
  assert.notEqual(u!.id, "u");
  assert.deepEqual({ ...read, id: "c", leaf: "a2" }, conversation);
  assert.deepEqual({ ...u, id: "u" }, question);
  const { top_logprobs: _, ...rest } = (a1 as AssistantMessage).steps[0]!.logprobs![0]!;
  assert.deepEqual(rest, { token: "t", logprob: -0.1 });
  assert.deepEqual({ ...a1, id: "a1", parent: "u" }, answer("a1", 2));
  assert.notEqual(importText(text).archives[0]!.conversation.id, read.id);
});

test("what is no export is refused", () => {
  for (const text of ["", "{", "[]", "null", "5", '{"format":"other"}', '{"format":"candle-vllm-conversations","version":2,"conversations":[]}', '{"format":"candle-vllm-conversations","version":1}']) {
    assert.throws(() => importText(text), ImportError, text);
  }
});

test("broken conversations are left out, hostile ones are made harmless", () => {
  const wrap = (...conversations: unknown[]) => importText(JSON.stringify({ format: "candle-vllm-conversations", version: 1, conversations }));
  for (const broken of [null, 5, {}, { conversation: { title: 5 }, messages: [] }, { conversation: { title: "x" }, messages: [null] }, { conversation: { title: "x" }, messages: [{ id: "a", role: "system", text: "x" }] }, { conversation: { title: "x" }, messages: [{ id: "a", role: "user", text: 5 }] }]) {
    assert.deepEqual([wrap(broken).archives.length, wrap(broken).broken], [0, 1], JSON.stringify(broken));
  }
  const hostile = wrap({ conversation: { title: "x", settings: { temperature: "hot", topP: 7, stop: [1, "a"], evil: 1, thinking: true } }, messages: [
    { id: "a", role: "assistant", parent: "a", state: "waiting", steps: [{ calls: [{ id: "1", name: "rm", arguments: "{}", state: "approved" }] }] },
  ] }).archives[0]!;
  assert.deepEqual(hostile.conversation.settings, { stop: ["a"], thinking: true });
  const message = hostile.messages[0] as AssistantMessage;
  assert.deepEqual([message.state, message.steps[0]!.calls[0]!.state], ["stopped", "denied"]);
  const failed = wrap({ conversation: { title: "x" }, messages: [{ id: "a", role: "assistant", state: "failed", steps: [{ text: "half" }] }] });
  assert.equal((failed.archives[0]!.messages[0] as AssistantMessage).state, "stopped"); // else nothing would say that it is no whole answer
});

test("the store that stands in", async () => {
  const store = new MemoryStore();
  await store.add(conversation, [question]);
  await store.add({ ...conversation, id: "other" }, [answer("a1", 2)]);
  assert.deepEqual((await store.messages("c")).map((one) => one.id), ["u"]);
  await store.deleteConversation("c");
  assert.deepEqual([(await store.conversations()).length, await store.messages("c"), (await store.messages("other")).length], [1, [], 1]);
  assert.deepEqual([await store.changeConversation("c", { title: "x" }), await store.putMessage({ ...question, conversation: "c" }), await store.messages("c")], [false, false, []]);
  assert.deepEqual([await store.changeConversation("other", { leaf: "a1" }), (await store.conversations())[0]], [true, { ...conversation, id: "other", leaf: "a1" }]);
  await store.putRecord("folders", folder);
  await store.putRecord("folders", { ...folder, id: "g" });
  await store.deleteRecord("folders", "g");
  assert.deepEqual(await store.records("folders"), [folder]);
  await store.clear();
  assert.deepEqual([await store.messages("other"), await store.records("folders")], [[], []]);
});

test("settings", () => {
  assert.deepEqual(merged({ temperature: 1, topK: 5 }, { temperature: 0 }), { temperature: 0, topK: 5 });
  assert.deepEqual(wireFields({ maxTokens: 5, minP: 0, schema: "{oops" }), { max_completion_tokens: 5, min_p: 0 });
  assert.deepEqual(wireFields({}), {});
  assert.equal(readNumber(" 0,5 ", RANGES.temperature), 0.5);
  assert.equal(readNumber("", RANGES.temperature), undefined);
  for (const wrong of ["x", "-1", "101", "NaN", "1e999"]) assert.equal(readNumber(wrong, RANGES.temperature), null, wrong);
  assert.equal(readNumber("1.5", RANGES.topK), null);
  for (const written of ["16000", "16,000", "16.000", "16 000", "16\u202f000", "16’000", " +16,000 "]) assert.equal(readNumber(written, RANGES.maxTokens), 16_000, written);
  for (const wrong of ["1,5", "16,000.5"]) assert.equal(readNumber(wrong, RANGES.maxTokens), null, wrong);
  assert.deepEqual([readNumber("-1,234,567", RANGES.seed), readNumber("1.000", RANGES.temperature)], [-1_234_567, 1]);
  assert.deepEqual(readSettings(null), {});
});

test("Prometheus' text", () => {
  const text = '# HELP x\nvllm:num_requests_running{model_name="a",engine="0"} 2.0\nvllm:num_requests_running{model_name="b } c",engine="0"} 1\nvllm:kv_cache_usage_perc{model_name="a"} 0.25\nvllm:kv_cache_usage_perc{model_name="b"} 0.125\nvllm:generation_tokens_total 1e3\nbad line\nx NaN\n';
  assert.deepEqual(valuesOf(text).get("vllm:num_requests_running"), [2, 1]);
  const [first, second] = [sampleOf(text, 0), sampleOf(text.replace("1e3", "1500"), 2000)];
  assert.deepEqual([first.running, first.kvUsage, rate([first, second], "generatedTokens")], [3, 0.25, [{ at: 2000, value: 250 }]]);
  assert.deepEqual(rate([second, first].map((one, at) => ({ ...one, at: at * 1000 })), "generatedTokens"), [{ at: 1000, value: 0 }]);
});

test("the languages have the same texts", () => {
  const shape = (value: unknown): unknown =>
    typeof value === "object" && value !== null ? Object.fromEntries(Object.entries(value).map(([name, one]) => [name, shape(one)])) : typeof value;
  assert.deepEqual(shape(de), shape(en));
  const empty = (value: unknown): boolean => (typeof value === "object" && value !== null ? Object.values(value).some(empty) : value === "");
  assert.ok(!empty(de) && !empty(en));
});

test("an imported file says what it likes, and gets nothing of it", () => {
  const text = `{"format": "candle-vllm-conversations", "version": 1, "__proto__": {"polluted": 1}, "conversations": [
    {"conversation": {"title": "p", "leaf": {"toString": 1}, "updated": 1e300, "created": -1, "settings": {"__proto__": {"temperature": 5}}},
     "messages": [{"id": "__proto__", "role": "user", "text": "t", "parent": {"toString": 1}, "created": 1e300}]}]}`;
  const { archives, broken } = importText(text);
  assert.equal(broken, 0);
  const { conversation: read, messages } = archives[0]!;
  assert.deepEqual([read.leaf, read.created, read.settings.temperature, messages[0]!.parent], [null, 0, undefined, null]);
  assert.ok(read.updated <= Date.now() && messages[0]!.created <= Date.now());
  assert.equal(({} as { polluted?: number }).polluted, undefined);
});

test("what the server takes for what is left out is shown by our names", () => {
  assert.deepEqual(served({ temperature: 0.8, top_k: 40, presence_penalty: 0.5, unknown: 1 }), { temperature: 0.8, topK: 40, presencePenalty: 0.5, frequencyPenalty: 0, repetitionPenalty: 1 });
  assert.deepEqual(served(), {});
});

const hex = (name: string) => [...name].map((letter) => letter.charCodeAt(0).toString(16)).join("").padStart(32, "0");
const asked = (id: string, parent: string | null, text = id): UserMessage => ({ id: hex(id), role: "user", parent: parent && hex(parent), created: 1, text });
const said = (id: string, parent: string, text = id): AssistantMessage => ({ id: hex(id), role: "assistant", parent: hex(parent), created: 2, model: "m", state: "done", steps: [{ reasoning: "", text, calls: [] }] });
const chatOf = (leaf: string, ...messages: Archive["messages"]): Archive => ({ conversation: { ...conversation, id: hex("chat"), leaf: hex(leaf) }, messages });

/** Imports an export of one into the other, which knows the messages of both, and gives what is there then. */
function imported(ours: Archive | undefined, theirs: Archive, ...elsewhere: string[]): Archive | undefined {
  const taken = new Set([...(ours?.messages ?? []).map((one) => one.id), ...elsewhere.map(hex)]);
  const more = missing(ours, importText(exportText({ folders: [], prompts: [], archives: [theirs] })).archives[0]!, (id) => taken.has(id));
  return more && { conversation: more.conversation, messages: [...(ours?.messages ?? []), ...more.messages] };
}
const texts = (archive: Archive | undefined) => archive?.messages.map((one) => (one.role === "user" ? one.text : one.steps.at(-1)!.text));

test("an export that is imported again brings nothing, and one that has grown brings what is new", () => {
  const small = chatOf("a1", asked("u1", null), said("a1", "u1"));
  const grown = chatOf("a2", ...small.messages, asked("u2", "a1"), said("a2", "u2"));
  const first = imported(undefined, small)!;
  assert.deepEqual(first, small);
  assert.equal(imported(first, small), undefined);
  const second = imported(first, grown)!;
  assert.deepEqual(second.messages, grown.messages);
  assert.equal(second.conversation.leaf, hex("a2")); // what follows the shown answer is shown
  assert.equal(imported(second, grown), undefined);
  assert.equal(imported(second, small), undefined); // nor does an older export take anything back
});

test("files of a question come back from an export, and what is no file is left out", () => {
  const files = [{ name: "a.txt", text: "A" }];
  const chat = chatOf("u1", { ...asked("u1", null), files });
  assert.deepEqual(imported(undefined, chat), chat);
  const odd = [null, 5, { name: "b" }, { name: 1, text: "" }, { name: "c", text: "x".repeat(1 << 20) }, ...files] as typeof files;
  assert.deepEqual(imported(undefined, chatOf("u1", { ...asked("u1", null), files: odd })), chat);
});

test("a conversation that went on in two places has both ways, and shows the one that was here", () => {
  const start = [asked("u1", null), said("a1", "u1")];
  const ours = { ...chatOf("a2", ...start, asked("u2", "a1"), said("a2", "u2")) };
  ours.conversation = { ...ours.conversation, title: "Ours", updated: 9 };
  const theirs = chatOf("a3", ...start, asked("u3", "a1"), said("a3", "u3"));
  const both = imported(ours, theirs)!;
  assert.deepEqual(texts(both), ["u1", "a1", "u2", "a2", "u3", "a3"]);
  assert.deepEqual([both.conversation.leaf, both.conversation.title, both.conversation.updated], [hex("a2"), "Ours", 9]);
});

test("an answer that went on elsewhere comes in beside the one that is here, once", () => {
  const ours = chatOf("a1", asked("u1", null), said("a1", "u1", "Half"));
  const theirs = chatOf("u2", asked("u1", null), said("a1", "u1", "Half and half"), asked("u2", "a1"));
  const both = imported(ours, theirs)!;
  assert.deepEqual(texts(both), ["u1", "Half", "Half and half", "u2"]);
  const [u1, , longer, u2] = both.messages;
  assert.deepEqual([longer!.parent, u2!.parent, both.conversation.leaf], [u1!.id, longer!.id, hex("a1")]);
  assert.equal(imported(both, theirs), undefined);
  assert.equal(imported(chatOf("a1", ...theirs.messages), ours), undefined);
});

test("ids of a file that stand for something else here take nothing away", () => {
  const theirs = chatOf("a1", asked("u1", null, "mine now"), said("a1", "u1"));
  const added = imported(undefined, theirs, "u1")!;
  assert.deepEqual(texts(added), ["mine now", "a1"]);
  assert.notEqual(added.messages[0]!.id, hex("u1"));
  assert.deepEqual([added.messages[1]!.parent, added.conversation.leaf], [added.messages[0]!.id, hex("a1")]);
  assert.equal(imported(added, theirs, "u1"), undefined);
  const circle = chatOf("b", { ...asked("a", "b") }, { ...asked("b", "a") }, asked("b", "a", "again"));
  assert.equal(imported(undefined, circle)!.messages.length, 2);
});

test("messages come in with their conversation or not at all", async () => {
  const store = new MemoryStore();
  await store.add(conversation, [question]);
  await assert.rejects(store.add({ ...conversation, id: "d" }, [answer("a1", 2), question]));
  assert.deepEqual([(await store.conversations()).length, await store.messageIds(), (await store.messages("d")).length], [1, ["u"], 0]);
});

test("what a database or a file holds of conversations and folders is read field by field", () => {
  const id = "a".repeat(32);
  const old = { id, title: "Old", renamed: false, created: 1, updated: 2, model: null, settings: {}, leaf: null }; // of version 1
  assert.deepEqual(readConversation(old), { ...old, pinned: false, folder: null });
  assert.deepEqual(readConversation({ ...old, pinned: "yes", folder: "../x", tools: ["a", 1] }), { ...old, pinned: false, folder: null, tools: ["a"] });
  assert.equal(readConversation({ id }), undefined);
  assert.deepEqual(readFolder({ id, name: ` ${"n".repeat(100)}`, created: "x", isOpen: 1, more: 1 }), [{ id, name: "n".repeat(80), created: 0, isOpen: false }]);
  for (const wrong of [null, 5, { id }, { id, name: " " }, { id: "x", name: "n" }, { name: "n" }]) assert.deepEqual(readFolder(wrong), [], JSON.stringify(wrong));
});

test("prompts are read field by field, and come in once", () => {
  assert.deepEqual(readPrompt({ ...prompt, kind: "other", more: 1 }), [prompt]);
  for (const wrong of [null, 5, { ...prompt, id: "x" }, { ...prompt, name: " " }, { ...prompt, text: "" }, { ...prompt, text: 5 }]) {
    assert.deepEqual(readPrompt(wrong), [], JSON.stringify(wrong));
  }
  assert.deepEqual(newPrompts([], [prompt, prompt]), [prompt]);
  const older = { ...prompt, text: "older", updated: 4 };
  const newer = { ...prompt, text: "newer", updated: 6 };
  assert.deepEqual(newPrompts([prompt], [prompt, older, { ...prompt, id: "c".repeat(32) }]), []);
  const [beside, ...more] = newPrompts([prompt], [newer]);
  assert.deepEqual([beside!.text, beside!.id === prompt.id, more.length], ["newer", false, 0]);
  assert.deepEqual(newPrompts([prompt, beside!], [newer]), []);
});

test("a folder of a file is the same, the one of its name, or a new one", () => {
  const make = (letter: string, name: string): Folder => ({ ...folder, id: letter.repeat(32), name });
  const [work, theirWork, art, art2] = [make("a", "Work"), make("b", "Work"), make("c", "Art"), make("d", "Art")];
  const places = new Places([work, make("e", "Renamed")], [theirWork, art, art2, make("e", "Old name")]);
  assert.deepEqual([work, theirWork, art, art2, make("e", "")].map((one) => places.of(one.id)?.[0]), [undefined, "a", "c", "c", "e"]);
  assert.deepEqual([places.of(art.id), places.of(null), places.added], [art.id, null, [art]]);
});

test("times are rounded before they are taken apart", () => {
  language.value = "en";
  assert.deepEqual([0.25, 1.25, 59.9, 59.97, 119.6, 3661].map(formatSeconds), ["250 ms", "1.3 s", "59.9 s", "1 min 0 s", "2 min 0 s", "61 min 1 s"]);
});
