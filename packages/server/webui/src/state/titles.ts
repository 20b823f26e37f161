// SPDX-License-Identifier: MIT
// Titles by the model: asked for when nothing else is, and dropped as soon as the user wants something.

import { streamChat } from "../api/chat.ts";
import { hasLine, readTitle } from "../chat/title.ts";

const running = new Set<AbortController>();

/** Ends what is being asked for, so that the user's own request is alone. */
export function stopTitles(): void {
  for (const one of running) one.abort();
  running.clear();
}

/** The title that a model answers with, "" where that is none, undefined where it was stopped. */
export async function askForTitle(request: object): Promise<string | undefined> {
  const aborter = new AbortController();
  running.add(aborter);
  let [said, finish] = ["", ""];
  try {
    for await (const { choices } of streamChat(request, aborter.signal)) {
      said += choices[0]?.delta.content ?? "";
      finish = choices[0]?.finish_reason ?? finish;
      if (hasLine(said)) break; // more is not wanted
    }
    return finish === "length" ? "" : readTitle(said);
  } catch {
    return aborter.signal.aborted ? undefined : ""; // a chat without a title is nothing to complain of
  } finally {
    running.delete(aborter);
  }
}
