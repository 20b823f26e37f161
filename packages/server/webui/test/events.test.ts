// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { readChunks } from "../src/api/chat.ts";
import { EventReader } from "../src/api/events.ts";
import { ApiError } from "../src/api/http.ts";

const STREAM = ': keep-alive\n\ndata: {"a":"ü🙂"}\r\n\r\nevent: x\ndata: one\ndata: two\n\n:\ndata:tight\r\rdata: [DONE]\n\ndata: cut';
const WANTED = ['{"a":"ü🙂"}', "one\ntwo", "tight", "[DONE]"];

test("events come out whole wherever the bytes are cut", () => {
  const bytes = new TextEncoder().encode(STREAM);
  for (let first = 0; first <= bytes.length; first++) {
    for (let second = first; second <= bytes.length; second += 3) {
      const reader = new EventReader();
      const events = [bytes.slice(0, first), bytes.slice(first, second), bytes.slice(second)].flatMap((part) => reader.push(part));
      assert.deepEqual(events, WANTED, `cut at ${first} and ${second}`);
    }
  }
});

test("byte by byte", () => {
  const reader = new EventReader();
  const events = [...new TextEncoder().encode(STREAM)].flatMap((byte) => reader.push(Uint8Array.of(byte)));
  assert.deepEqual(events, WANTED);
});

const body = (text: string) => new Blob([text]).stream() as ReadableStream<Uint8Array>;
const all = async (text: string) => {
  const chunks: unknown[] = [];
  let failure: unknown;
  try {
    for await (const chunk of readChunks(body(text))) chunks.push(chunk);
  } catch (error) {
    failure = error;
  }
  return { chunks, failure: failure instanceof ApiError ? failure.info : undefined };
};

test("a stream ends with [DONE]; one without it was cut off", async () => {
  const chunk = 'data: {"choices":[]}\n\n';
  assert.deepEqual(await all(`${chunk}data: [DONE]\n\nrubbish`), { chunks: [{ choices: [] }], failure: undefined });
  assert.deepEqual(await all(chunk), { chunks: [{ choices: [] }], failure: { kind: "dropped", message: "" } });
});

test("errors in the stream", async () => {
  const said = await all('data: {"error":{"message":"no more memory","param":null}}\n\n');
  assert.deepEqual(said.failure, { kind: "stream", message: "no more memory" });
  for (const broken of ["data: {\n\n", "data: null\n\n", "data: 5\n\n", 'data: {"choices":5}\n\n']) {
    assert.equal((await all(broken)).failure?.kind, "stream", broken);
  }
});
