// SPDX-License-Identifier: MIT
// Vercel's AI SDK by the models of three providers: answers, streams, tools, forms, errors and ends.
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, cosineSimilarity, embed, embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const ADDRESS = process.env.SUITE_ADDRESS;
const EMBEDDER = process.env.SUITE_EMBEDDER;
const openai = createOpenAI({ baseURL: `${ADDRESS}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "local", baseURL: `${ADDRESS}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const MODELS = {
  compatible: compatible.chatModel("qwen"),
  chat: openai.chat("qwen"),
  responses: openai.responses("qwen"),
  anthropic: createAnthropic({ baseURL: `${ADDRESS}/v1`, apiKey: "none" })("qwen"),
};
const SETTINGS = { temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
const PERSON = z.object({ name: z.string(), age: z.number().int() });
const BOB = { name: "Bob", age: 41 };
const ASKED = "Bob is 41 years old. Extract as JSON.";
const WEATHER = { description: "The weather in a city.", inputSchema: z.object({ city: z.string() }) };
const ASKS = "What is the weather in Paris? Use the tool.";

function each(scenario, run) {
  for (const [name, model] of Object.entries(MODELS)) {
    test(`${scenario} [${name}]`, { timeout: 300_000 }, () => run({ model, ...SETTINGS }, name));
  }
}

async function all(iterable) {
  const found = [];
  for await (const part of iterable) found.push(part);
  return found;
}

each("text", async (settings) => {
  const result = await generateText({ ...settings, prompt: "Say hello." });
  assert.ok(result.text);
  assert.equal(result.finishReason, "stop");
  assert.ok(result.usage.inputTokens > 0 && result.usage.outputTokens > 0);
  assert.equal(result.response.modelId, "qwen");
});

each("stream", async (settings) => {
  const whole = await generateText({ ...settings, prompt: "Say hello." });
  const result = streamText({ ...settings, prompt: "Say hello." });
  assert.equal((await all(result.textStream)).join(""), whole.text);
  assert.equal(await result.finishReason, "stop");
  assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
});

each("history", async (settings) => {
  const messages = [
    { role: "user", content: "My name is Bob." },
    { role: "assistant", content: "Hello Bob." },
    { role: "user", content: [{ type: "text", text: "What is my name?" }] },
  ];
  const result = await generateText({ ...settings, system: "Be brief.", messages });
  assert.match(result.text, /Bob/);
});

each("length", async (settings, name) => {
  const result = await generateText({ ...settings, prompt: "Write a long story.", maxOutputTokens: 16 });
  assert.equal(result.finishReason, "length", name);
  assert.equal(result.usage.outputTokens, 16);
});

each("stop", async (settings, name) => {
  const result = await generateText({ ...settings, prompt: "Count from 1 to 9, separated by commas.", stopSequences: ["4"] });
  if (name === "responses") {
    assert.equal(result.warnings[0].feature, "stopSequences"); // OpenAI's Responses API has none
  } else {
    assert.match(result.text, /3/);
    assert.doesNotMatch(result.text, /4/);
    assert.equal(result.finishReason, "stop");
  }
});

each("call", async (settings) => {
  const result = await generateText({ ...settings, prompt: ASKS, tools: { weather: tool(WEATHER) }, toolChoice: "required" });
  assert.equal(result.finishReason, "tool-calls");
  assert.equal(result.toolCalls.length, 1);
  assert.equal(result.toolCalls[0].toolName, "weather");
  assert.match(result.toolCalls[0].input.city, /Paris/);
});

each("streamed call", async (settings) => {
  const chosen = { toolChoice: { type: "tool", toolName: "weather" } };
  const result = streamText({ ...settings, prompt: ASKS, tools: { weather: tool(WEATHER) }, ...chosen });
  const parts = await all(result.fullStream);
  const call = parts.find((part) => part.type === "tool-call");
  const deltas = parts.filter((part) => part.type === "tool-input-delta").map((part) => part.delta);
  assert.match(call.input.city, /Paris/);
  assert.deepEqual(JSON.parse(deltas.join("")), call.input);
  assert.equal(await result.finishReason, "tool-calls");
});

function loop(settings, cities) {
  const execute = ({ city }) => {
    cities.push(city);
    return "It rains.";
  };
  const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });
  const tools = { get_weather: tool({ ...WEATHER, description: "Get the weather in a city.", execute }) };
  return { ...settings, prompt: ASKS, tools, prepareStep, stopWhen: stepCountIs(3) };
}

each("loop", async (settings) => {
  const cities = [];
  const result = await generateText(loop(settings, cities));
  assert.match(cities.join(), /^[^,]*Paris[^,]*/);
  assert.equal(result.steps.length, 2);
  assert.match(result.text, /rain/i);
});

each("streamed loop", async (settings) => {
  const cities = [];
  const result = streamText(loop(settings, cities));
  assert.match((await all(result.textStream)).join(""), /rain/i);
  assert.equal((await result.steps).length, 2);
  assert.equal(cities.length, 1);
});

each("object", async (settings) => {
  const result = await generateObject({ ...settings, prompt: ASKED, schema: PERSON });
  assert.deepEqual(result.object, BOB);
});

each("streamed object", async (settings) => {
  const result = streamObject({ ...settings, prompt: ASKED, schema: PERSON });
  const parts = await all(result.partialObjectStream);
  assert.ok(parts.length > 1);
  assert.deepEqual(parts.at(-1), BOB);
  assert.deepEqual(await result.object, BOB);
});

each("output", async (settings) => {
  const prompt = "Bob is 41 years old, and Eve is 39 years old. List them as JSON.";
  const result = await generateText({ ...settings, prompt, output: Output.array({ element: PERSON }) });
  assert.deepEqual(result.output.map((person) => person.name), ["Bob", "Eve"]);
  const options = ["sunny", "rainy"];
  const chosen = await generateText({ ...settings, prompt: "It rains. How is the weather?", output: Output.choice({ options }) });
  assert.ok(options.includes(chosen.output));
});

each("error", async (settings) => {
  const prompt = "word ".repeat(20_000);
  await assert.rejects(generateText({ ...settings, prompt }), (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /maximum context length/);
    assert.equal(error.isRetryable, false);
    return true;
  });
  const seen = [];
  const result = streamText({ ...settings, prompt, onError: ({ error }) => seen.push(error) });
  await result.consumeStream();
  assert.equal(seen.length, 1);
  assert.match(seen[0].message, /maximum context length/);
});

each("abort", async (settings) => {
  const controller = new AbortController();
  const prompt = "Write a long story.";
  const result = streamText({ ...settings, prompt, maxOutputTokens: 4000, abortSignal: controller.signal });
  const kinds = [];
  for await (const part of result.fullStream) {
    kinds.push(part.type);
    if (part.type === "text-delta") controller.abort();
  }
  assert.ok(kinds.includes("abort"));
  for (let tries = 0; tries < 100; tries++) {
    if ((await (await fetch(`${ADDRESS}/load`)).json()).server_load === 0) return;
    await sleep(100);
  }
  assert.fail("the answer goes on");
});

for (const [name, model] of Object.entries({ compatible: compatible.completionModel("qwen"), openai: openai.completion("qwen") })) {
  test(`completion [${name}]`, { timeout: 300_000 }, async () => {
    const settings = { model, prompt: "1, 2, 3,", ...SETTINGS, maxOutputTokens: 8 };
    const whole = await generateText(settings);
    assert.ok(whole.text);
    assert.equal((await all(streamText(settings).textStream)).join(""), whole.text);
  });
}

const EMBEDDERS = {
  compatible: createOpenAICompatible({ name: "local", baseURL: `${EMBEDDER}/v1` }).embeddingModel("minilm"),
  openai: createOpenAI({ baseURL: `${EMBEDDER}/v1`, apiKey: "none" }).embedding("minilm"),
};
for (const [name, model] of Object.entries(EMBEDDERS)) {
  test(`embeddings [${name}]`, { timeout: 300_000 }, async () => {
    const { embeddings, usage } = await embedMany({ model, values: ["a cat", "a kitten", "a car park"] });
    const [cat, kitten, park] = embeddings;
    assert.ok(cosineSimilarity(cat, kitten) > cosineSimilarity(cat, park));
    assert.ok(usage.tokens > 0);
    const one = await embed({ model, value: "a cat" });
    assert.ok(cosineSimilarity(one.embedding, cat) > 0.9999);
  });
}
