// SPDX-License-Identifier: MIT
// What tabs of this page tell each other: that something kept is not what it was, and which conversations stand still now.

import { isId } from "../store/records.ts";

const GATHER_MS = 100; // what is told in one go is read once

let channel: BroadcastChannel | undefined;

/** Says to the other tabs that lists have changed, and these conversations. A browser without channels says nothing. */
export const tell = (...ids: readonly string[]): void => channel?.postMessage(ids);

/** Calls `read` with the conversations that other tabs have changed. */
export function listen(read: (ids: readonly string[]) => void): void {
  if (typeof BroadcastChannel === "undefined") return;
  channel = new BroadcastChannel("candle-vllm");
  const told = new Set<string>();
  let waiting: ReturnType<typeof setTimeout> | undefined;
  channel.onmessage = ({ data }: MessageEvent<unknown>) => {
    if (Array.isArray(data)) for (const id of data) if (isId(id)) told.add(id);
    waiting ??= setTimeout(() => {
      waiting = undefined;
      const ids = [...told];
      told.clear();
      read(ids);
    }, GATHER_MS);
  };
}
