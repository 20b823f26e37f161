// SPDX-License-Identifier: MIT
// Opens the list of conversations where it is hidden.

import { t } from "../i18n/index.ts";
import { preferences } from "../state/preferences.ts";
import { Icon } from "./Icon.tsx";
import { toggleSidebar } from "./shortcuts.ts";

export function SidebarButton() {
  return (
    <button type="button" class={`icon-button sidebar-button${preferences.value.sidebar ? " narrow-only" : ""}`}
      aria-label={t.value.showSidebar} data-tip={t.value.showSidebar} onClick={toggleSidebar}>
      <Icon name="menu" />
    </button>
  );
}
