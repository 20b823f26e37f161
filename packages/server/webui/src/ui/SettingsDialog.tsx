// SPDX-License-Identifier: MIT
// Settings: of this conversation, of all, the key, and what is done with the data.

import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { served } from "../chat/settings.ts";
import type { ChatSettings } from "../chat/types.ts";
import { LANGUAGES, t } from "../i18n/index.ts";
import { close, type SettingsTab } from "../state/dialogs.ts";
import { cardFor, isKeyWrong } from "../state/models.ts";
import { changeChatSettings, shownStart } from "../state/new-chat.ts";
import { prefer, preferences } from "../state/preferences.ts";
import type { Theme } from "../store/preferences.ts";
import { DataTab } from "./DataTab.tsx";
import { Dialog } from "./Dialog.tsx";
import { KeyForm } from "./KeyForm.tsx";
import { SettingsFields } from "./SettingsFields.tsx";

const TABS: readonly SettingsTab[] = ["chat", "general", "access", "data"];

export function SettingsDialog({ tab: first }: { tab: SettingsTab }) {
  const [tab, show] = useState<SettingsTab>(first);
  const move = (event: KeyboardEvent) => {
    const by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (!by) return;
    const next = TABS[(TABS.indexOf(tab) + by + TABS.length) % TABS.length]!;
    show(next);
    document.getElementById(`tab-${next}`)?.focus();
  };
  return (
    <Dialog title={t.value.settings} onClose={close} wide>
      <div class="tabs" role="tablist" aria-label={t.value.settings} onKeyDown={move}>
        {TABS.map((one) => (
          <button key={one} type="button" role="tab" id={`tab-${one}`} aria-selected={one === tab} aria-controls={`panel-${one}`}
            tabIndex={one === tab ? 0 : -1} onClick={() => show(one)}>
            {t.value.tabs[one]}
          </button>
        ))}
      </div>
      <div role="tabpanel" id={`panel-${tab}`} aria-labelledby={`tab-${tab}`} class="panel">
        {tab === "chat" && <ChatTab />}
        {tab === "general" && <GeneralTab />}
        {tab === "access" && <><p class="faint">{t.value.accessText}</p>{isKeyWrong.value && <p class="hint wrong" role="alert">{t.value.keyWrong}</p>}<KeyForm /></>}
        {tab === "data" && <DataTab />}
      </div>
    </Dialog>
  );
}

function ChatTab() {
  const { settings, model } = shownStart.value;
  const general = preferences.value.settings;
  return (
    <>
      <Lead text={t.value.chatSettingsText} onReset={Object.keys(settings).length ? () => changeChatSettings({}) : undefined} />
      <SettingsFields settings={settings} general={general} defaults={served(cardFor(model)?.default_sampling)} onChange={changeChatSettings} />
    </>
  );
}

function GeneralTab() {
  const { settings, theme, language } = preferences.value;
  const change = (next: ChatSettings) => prefer({ settings: next });
  return (
    <>
      <div class="fields two">
        <label class="field">
          <span>{t.value.theme}</span>
          <select class="input" value={theme} onChange={(event) => prefer({ theme: event.currentTarget.value as Theme })}>
            {(["system", "light", "dark"] as const).map((one) => <option key={one} value={one}>{t.value.themes[one]}</option>)}
          </select>
        </label>
        <label class="field">
          <span>{t.value.language}</span>
          <select class="input" value={language ?? ""} onChange={(event) => prefer({ language: event.currentTarget.value || null })}>
            <option value="">{t.value.browserLanguage}</option>
            {Object.entries(LANGUAGES).map(([code, texts]) => <option key={code} value={code} lang={code}>{texts.languageName}</option>)}
          </select>
        </label>
      </div>
      <label class="check">
        <input type="checkbox" checked={preferences.value.titles} onChange={(event) => prefer({ titles: event.currentTarget.checked })} />
        <span>{t.value.titles}<br /><span class="hint">{t.value.titlesHint}</span></span>
      </label>
      <h3>{t.value.answers}</h3>
      <Lead text={t.value.generalText} onReset={Object.keys(settings).length ? () => change({}) : undefined} />
      <SettingsFields settings={settings} defaults={served(cardFor(shownStart.value.model)?.default_sampling)} onChange={change} />
    </>
  );
}

function Lead({ text, onReset }: { text: ComponentChildren; onReset: (() => void) | undefined }) {
  return (
    <div class="lead">
      <p class="faint">{text}</p>
      <button type="button" class="button small" disabled={!onReset} onClick={onReset}>{t.value.resetAll}</button>
    </div>
  );
}
