// SPDX-License-Identifier: MIT
// Titles by the model: asked for when nothing else is, and dropped as soon as the user wants something.

import { streamChat } from "../api/chat.ts";
import { hasLine, readTitle, titleOf } from "../chat/title.ts";
import type { Attached } from "../chat/types.ts";
import { t } from "../i18n/index.ts";

/** The title of a new conversation, by its first message: its text, else its file, else that it is a picture. */
export const firstTitle = (text: string, { files }: Attached): string => titleOf(text || files?.[0]?.name || t.peek().picture);

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
