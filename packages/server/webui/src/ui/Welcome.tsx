// What stands where no message is yet.

import { t } from "../i18n/index.ts";
import { cardFor, connection } from "../state/models.ts";
import { shownStart } from "../state/new-chat.ts";

export function Welcome() {
  const card = cardFor(shownStart.value.model);
  const isReady = connection.value === "ready" && card;
  return (
    <section class="welcome">
      <img src="icon.svg" alt="" width="48" height="48" />
      <h2>{t.value.welcome}</h2>
      {isReady && <p>{t.value.welcomeModel(card.id)}</p>}
      {isReady && card.status !== "ready" && <p class="faint">{t.value.loadsOnFirst}</p>}
      {connection.value === "connecting" && <p class="faint">{t.value.connecting}</p>}
      <ul class="suggestions">
        {t.value.suggestions.map((text) => (
          <li key={text}>
            <button type="button" class="suggestion" onClick={() => suggest(text)}>{text}</button>
          </li>
        ))}
      </ul>
      <p class="faint small">{t.value.privacy}</p>
    </section>
  );
}

/** Puts a text into the input, where it can be changed before it is sent. */
function suggest(text: string): void {
  const input = document.getElementById("composer");
  if (!(input instanceof HTMLTextAreaElement)) return;
  input.value = text;
  input.dispatchEvent(new Event("input", { bubbles: true }));
  input.focus();
}
