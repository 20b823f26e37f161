// The beginning: stored things are read, the server is asked, the page is drawn.

import { render } from "preact";
import { startChats } from "./state/chats.ts";
import { watchLeaving } from "./state/leaving.ts";
import { refreshMcp } from "./state/mcp.ts";
import { refreshModels } from "./state/models.ts";
import { followPageKey } from "./state/page-key.ts";
import { applyPreferences } from "./state/preferences.ts";
import { followAddress } from "./state/route.ts";
import { App } from "./ui/App.tsx";
import { listenForShortcuts } from "./ui/shortcuts.ts";

watchLeaving();
applyPreferences();
followPageKey();
followAddress();
listenForShortcuts();
render(<App />, document.getElementById("app")!);
void startChats();
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) void refreshModels().then(() => refreshMcp().catch(() => undefined));
});
void refreshModels().then(() => refreshMcp().catch(() => undefined));
