// SPDX-License-Identifier: MIT
// The beginning: stored things are read, the server is asked, the page is drawn.

import { effect, untracked } from "@preact/signals";
import { render } from "preact";
import { startChats } from "./state/chats.ts";
import { readLibrary } from "./state/exchange.ts";
import { watchLeaving } from "./state/leaving.ts";
import { refreshMcp } from "./state/mcp.ts";
import { arrivals, watchServer } from "./state/models.ts";
import { followPageKey } from "./state/page-key.ts";
import { applyPreferences } from "./state/preferences.ts";
import { followAddress } from "./state/route.ts";
import { App } from "./ui/App.tsx";
import { closeListWhereWide, keepDroppedFilesOut, listenForShortcuts } from "./ui/shortcuts.ts";

watchLeaving();
applyPreferences();
followPageKey();
followAddress();
listenForShortcuts();
keepDroppedFilesOut();
closeListWhereWide();
render(<App />, document.getElementById("app")!);
void startChats(readLibrary);
watchServer();
const askForTools = () => void refreshMcp().catch(() => undefined);
document.addEventListener("visibilitychange", () => document.hidden || askForTools());
effect(() => {
  if (arrivals.value) untracked(askForTools);
});
