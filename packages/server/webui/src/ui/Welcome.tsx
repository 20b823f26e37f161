// SPDX-License-Identifier: MIT
// What stands where no message is yet.

import type { ModelCard } from "../api/types.ts";
import { t } from "../i18n/index.ts";
import { cardFor, connection, isBusy } from "../state/models.ts";
import { shownStart } from "../state/new-chat.ts";
import { isPersistent } from "../state/storage.ts";
import { change, FailureNote, LoadingLine } from "./ModelState.tsx";

export function Welcome() {
  const card = cardFor(shownStart.value.model);
  return (
    <section class="welcome">
      <img src="icon.svg" alt="" width="48" height="48" />
      <h2>{t.value.welcome}</h2>
      {connection.value === "ready" && (card ? <State card={card} /> : <p class="faint">{t.value.noModelYet}</p>)}
      {connection.value === "connecting" && <p class="faint">{t.value.connecting}</p>}
      <ul class="suggestions">
        {t.value.suggestions.map((text) => (
          <li key={text}>
            <button type="button" class="suggestion" onClick={() => suggest(text)}>{text}</button>
          </li>
        ))}
      </ul>
      {isPersistent.value && <p class="faint small">{t.value.privacy}</p>}
    </section>
  );
}

function State({ card }: { card: ModelCard }) {
  if (isBusy(card)) {
    return (
      <>
        <LoadingLine card={card} />
        <p class="faint">{t.value.writeAlready}</p>
      </>
    );
  }
  if (card.status === "ready") return <p>{t.value.welcomeModel(card.id)}</p>;
  if (card.status === "failed") return <FailureNote card={card} />;
  return (
    <>
      <p class="faint">{t.value.notLoaded(card.id)}</p>
      <button type="button" class="button" onClick={() => change(card.id, "loading")}>{t.value.loadNow}</button>
    </>
  );
}

/** Puts a text into the input, where it can be changed before it is sent. */
function suggest(text: string): void {
  const input = document.getElementById("composer");
  if (!(input instanceof HTMLTextAreaElement)) return;
  input.focus();
  input.select();
  document.execCommand("insertText", false, text); // unlike an assignment, it can be undone
}
