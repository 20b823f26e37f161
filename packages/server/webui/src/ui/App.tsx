// SPDX-License-Identifier: MIT
// The whole page.

import { useEffect } from "preact/hooks";
import { shownLanguage, t } from "../i18n/index.ts";
import { current } from "../state/chats.ts";
import { isSidebarOver, open } from "../state/dialogs.ts";
import { announcement } from "../state/notices.ts";
import { route } from "../state/route.ts";
import { ChatPage } from "./ChatPage.tsx";
import { Confirm } from "./Dialog.tsx";
import { ExportDialog } from "./ExportDialog.tsx";
import { ModelsPage } from "./ModelsPage.tsx";
import { MoveDialog } from "./MoveDialog.tsx";
import { Notices } from "./Notices.tsx";
import { PromptsDialog } from "./PromptsDialog.tsx";
import { ServerPage } from "./ServerPage.tsx";
import { SettingsDialog } from "./SettingsDialog.tsx";
import { ShortcutSheet } from "./ShortcutSheet.tsx";
import { Sidebar } from "./Sidebar.tsx";
import { ToolsPage } from "./ToolsPage.tsx";
import { Tooltip } from "./Tooltip.tsx";

export function App() {
  const { page } = route.value;
  const titles = { chat: current.value?.info.value.title, models: t.value.models, server: t.value.server, tools: t.value.tools };
  const title = titles[page];
  useEffect(() => {
    document.documentElement.lang = shownLanguage.value;
    document.title = title ? `${title} · candle-vllm` : "candle-vllm";
  }, [title, shownLanguage.value]);
  return (
    <div class="app">
      <a class="skip" href={page === "chat" ? "#composer" : "#main"} onClick={skip}>{page === "chat" ? t.value.skipToInput : t.value.skipToContent}</a>
      <Sidebar />
      <main class="main" id="main" tabIndex={-1} inert={isSidebarOver.value}>
        <Notices />
        {page === "chat" && <ChatPage />}
        {page === "models" && <ModelsPage />}
        {page === "server" && <ServerPage />}
        {page === "tools" && <ToolsPage />}
        <Tooltip />
      </main>
      <OpenDialog />
      <div class="off-screen" role="status" aria-live="polite">{announcement.value}</div>
    </div>
  );
}

// The address stays what it is: what stands in it after # says which page is shown.
function skip(event: Event): void {
  event.preventDefault();
  (document.getElementById("composer") ?? document.getElementById("main"))?.focus();
}

function OpenDialog() {
  const shown = open.value;
  if (!shown) return null;
  if (shown.kind === "settings") return <SettingsDialog tab={shown.tab} />;
  if (shown.kind === "shortcuts") return <ShortcutSheet />;
  if (shown.kind === "export") return <ExportDialog id={shown.id} />;
  if (shown.kind === "move") return <MoveDialog id={shown.id} />;
  if (shown.kind === "prompts") return <PromptsDialog />;
  const { back = null, ...question } = shown.question;
  return <Confirm {...question} onClose={() => (open.value = back)} />;
}
