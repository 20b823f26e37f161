// SPDX-License-Identifier: MIT
// The stream of a chat answer.

import { EventReader } from "./events.ts";
import { ApiError, describeError, isAbort, jsonRequest, send } from "./http.ts";
import { readChunk } from "./readers.ts";
import { Pauses } from "./pause.ts";
import type { ChatChunk } from "./types.ts";

/** Sends a chat request and yields its chunks; ApiError where it fails, is cut off, or breaks in the middle. */
export async function* streamChat(request: object, signal: AbortSignal): AsyncGenerator<ChatChunk> {
  const response = await send("v1/chat/completions", jsonRequest(request, signal));
  if (!response.body) throw new ApiError({ kind: "stream", message: "" });
  yield* readChunks(response.body);
}

export async function* readChunks(body: ReadableStream<Uint8Array>): AsyncGenerator<ChatChunk> {
  const source = body.getReader();
  const events = new EventReader();
  const pauses = new Pauses();
  try {
    for (;;) {
      const { done, value } = await next(source);
      if (done) throw new ApiError({ kind: "dropped", message: "" });
      for (const data of events.push(value)) {
        if (data === "[DONE]") return;
        yield parse(data);
        await pauses.takeIfDue();
      }
    }
  } finally {
    void source.cancel().catch(() => undefined);
  }
}

async function next(source: ReadableStreamDefaultReader<Uint8Array>) {
  try {
    return await source.read();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError({ kind: "dropped", message: "" });
  }
}

function parse(data: string): ChatChunk {
  let chunk: unknown;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError({ kind: "stream", message: "" });
  }
  if (chunk && typeof chunk === "object" && "error" in chunk) {
    throw new ApiError({ kind: "stream", ...describeError(chunk) });
  }
  const read = readChunk(chunk);
  if (!read) throw new ApiError({ kind: "stream", message: "" });
  return read;
}
