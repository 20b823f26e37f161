// SPDX-License-Identifier: MIT
// The field for the API key, with where the key is kept.

import { useId, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { refreshMcp } from "../state/mcp.ts";
import { refreshModels } from "../state/models.ts";
import { apiKey, setKey } from "../state/preferences.ts";

export function KeyForm() {
  const [key, write] = useState(apiKey.value.key);
  const [remember, setRemember] = useState(apiKey.value.remembered);
  const [isShown, show] = useState(false);
  const id = useId();
  const use = (wanted: string, kept: boolean) => {
    setKey(wanted, kept);
    void refreshModels().then(() => refreshMcp().catch(() => undefined));
  };
  const forget = () => {
    write("");
    setRemember(false);
    use("", false);
  };
  return (
    <form class="key-form" onSubmit={(event) => { event.preventDefault(); use(key, remember); }}>
      <label for={id}>{t.value.apiKey}</label>
      <div class="field-row">
        <input id={id} class="input" type={(isShown ? "text" : "password") as "password" /* the types know no field that is both */} autocomplete="off" autocapitalize="off" spellcheck={false} value={key}
          aria-describedby={`${id}-kept`} onInput={(event) => write(event.currentTarget.value)} />
        <button type="button" class="button" aria-pressed={isShown} aria-label={t.value.showKey} onClick={() => show(!isShown)}>{isShown ? t.value.hide : t.value.show}</button>
        <button type="submit" class="button">{t.value.use}</button>
      </div>
      <label class="check">
        <input type="checkbox" checked={remember} onChange={(event) => setRemember(event.currentTarget.checked)} />
        {t.value.rememberKey}
      </label>
      <p id={`${id}-kept`} class="hint">{remember ? t.value.keyOnDevice : t.value.keyInTab}</p>
      {apiKey.value.key && <button type="button" class="button small danger" onClick={forget}>{t.value.forgetKey}</button>}
    </form>
  );
}
