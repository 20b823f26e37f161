// The field for the API key.

import { useId, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { refreshMcp } from "../state/mcp.ts";
import { refreshModels } from "../state/models.ts";
import { apiKey, setKey } from "../state/preferences.ts";

export function KeyForm() {
  const [key, write] = useState(apiKey.value.key);
  const [remember, setRemember] = useState(apiKey.value.remembered);
  const id = useId();
  const use = (event: Event) => {
    event.preventDefault();
    setKey(key, remember);
    void refreshModels().then(() => refreshMcp().catch(() => undefined));
  };
  return (
    <form class="key-form" onSubmit={use}>
      <label for={id}>{t.value.apiKey}</label>
      <div class="field-row">
        <input id={id} class="input" type="password" autocomplete="off" spellcheck={false} value={key}
          onInput={(event) => write(event.currentTarget.value)} />
        <button type="submit" class="button">{t.value.use}</button>
      </div>
      <label class="check">
        <input type="checkbox" checked={remember} onChange={(event) => setRemember(event.currentTarget.checked)} />
        {t.value.rememberKey}
      </label>
    </form>
  );
}
