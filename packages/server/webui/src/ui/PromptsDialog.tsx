// SPDX-License-Identifier: MIT
// The library of prompts: the list, and the form for one.

import { useId, useState } from "preact/hooks";
import type { Prompt } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import { close, confirmFirst } from "../state/dialogs.ts";
import { deletePrompt, keepPrompts, prompts } from "../state/prompts.ts";
import { newId } from "../store/ids.ts";
import { MAX_NAME } from "../store/records.ts";
import { Dialog } from "./Dialog.tsx";
import { Icon } from "./Icon.tsx";

export function PromptsDialog() {
  const [edited, edit] = useState<Prompt>();
  if (edited) return <PromptForm prompt={edited} onDone={() => edit(undefined)} />;
  const remove = ({ id, name }: Prompt) => confirmFirst({
    title: t.value.deletePrompt, text: t.value.deletePromptText(name), action: t.value.delete, back: { kind: "prompts" },
    onConfirm: () => deletePrompt(id),
  });
  return (
    <Dialog key="list" title={t.value.prompts} onClose={close} wide>
      <div class="lead">
        <p class="faint">{t.value.promptsText}</p>
        <button type="button" class="button small" onClick={() => edit({ id: newId(), name: "", kind: "message", text: "", updated: 0 })}>
          <Icon name="plus" />{t.value.newPrompt}
        </button>
      </div>
      {!prompts.value.length && <p class="empty">{t.value.noPrompts}</p>}
      <ul class="prompts">
        {prompts.value.map((one) => (
          <li key={one.id}>
            <div>
              <h3>{one.name}{one.kind === "system" && <span class="tag">{t.value.promptKinds.system}</span>}</h3>
              <p class="tool-description">{one.text.slice(0, 300)}</p>
            </div>
            <button type="button" class="icon-button" aria-label={t.value.editOf(one.name)} data-tip={t.value.edit} onClick={() => edit(one)}><Icon name="edit" /></button>
            <button type="button" class="icon-button" aria-label={t.value.deleteOf(one.name)} data-tip={t.value.delete} onClick={() => remove(one)}><Icon name="trash" /></button>
          </li>
        ))}
      </ul>
    </Dialog>
  );
}

function PromptForm({ prompt, onDone }: { prompt: Prompt; onDone: () => void }) {
  const [draft, setDraft] = useState(prompt);
  const id = useId();
  const isWhole = draft.name.trim() !== "" && draft.text.trim() !== "";
  const save = (event: Event) => {
    event.preventDefault();
    if (!isWhole) return;
    keepPrompts([{ ...draft, name: draft.name.trim(), updated: Date.now() }]);
    onDone();
  };
  return (
    <Dialog key="form" title={prompt.name ? t.value.editOf(prompt.name) : t.value.newPrompt} onClose={onDone} wide>
      <form class="fields" onSubmit={save}>
        <div class="field">
          <label for={`${id}-name`}>{t.value.name}</label>
          <input id={`${id}-name`} class="input" value={draft.name} maxLength={MAX_NAME} autocomplete="off" autofocus required onInput={(event) => setDraft({ ...draft, name: event.currentTarget.value })} />
        </div>
        <div class="field">
          <label for={`${id}-kind`}>{t.value.promptKind}</label>
          <select id={`${id}-kind`} class="input" value={draft.kind} aria-describedby={`${id}-hint`} onChange={(event) => setDraft({ ...draft, kind: event.currentTarget.value === "system" ? "system" : "message" })}>
            <option value="message">{t.value.promptKinds.message}</option>
            <option value="system">{t.value.promptKinds.system}</option>
          </select>
          <span id={`${id}-hint`} class="hint">{t.value.promptHints[draft.kind]}</span>
        </div>
        <div class="field">
          <label for={`${id}-text`}>{t.value.text}</label>
          <textarea id={`${id}-text`} class="input" dir="auto" rows={8} required value={draft.text} onInput={(event) => setDraft({ ...draft, text: event.currentTarget.value })} />
        </div>
        <footer class="dialog-actions">
          <button type="button" class="button" onClick={onDone}>{t.value.cancel}</button>
          <button type="submit" class="button primary" disabled={!isWhole}>{t.value.save}</button>
        </footer>
      </form>
    </Dialog>
  );
}
