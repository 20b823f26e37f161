// SPDX-License-Identifier: MIT
// The models: which one answers, and loading and unloading them.

import { useEffect, useState } from "preact/hooks";
import type { ModelCard } from "../api/types.ts";
import { t } from "../i18n/index.ts";
import { cardFor, connection, firstOf, isBusy, models, refreshModels, statusOf } from "../state/models.ts";
import { changeStart, shownStart } from "../state/new-chat.ts";
import { prefer } from "../state/preferences.ts";
import { hashOf } from "../state/route.ts";
import { follow } from "./ConversationList.tsx";
import { Icon } from "./Icon.tsx";
import { factsOf, FailureNote, LoadButton, LoadingBar, StatusDot, stateText } from "./ModelState.tsx";
import { Popover } from "./Popover.tsx";

export function ModelPicker() {
  const [isOpen, setOpen] = useState(false);
  const card = cardFor(shownStart.value.model);
  useEffect(() => {
    if (isOpen) void refreshModels();
  }, [isOpen]);
  const name = card?.id ?? (connection.value === "connecting" ? t.value.connecting : t.value.noModel);
  const choose = (id: string) => {
    changeStart({ model: id });
    prefer({ model: id });
    setOpen(false);
  };
  return (
    <Popover label={t.value.modelIs(name)} buttonClass="model-button" isOpen={isOpen} onToggle={setOpen}
      button={<>{card && <StatusDot status={statusOf(card)} />}<span class="model-name">{shortName(name)}</span><Icon name="down" /></>}>
      <h2 class="popover-title">{t.value.models}</h2>
      {!models.value.length && <p class="faint">{t.value.noModel}</p>}
      <ul class="models">
        {models.value.map((one) => (
          <Row key={one.id} card={one} isChosen={one.id === card?.id} onChoose={() => choose(one.id)} />
        ))}
      </ul>
      <a class="nav-item" href={hashOf({ page: "models" })} onClick={(event) => { setOpen(false); follow({ page: "models" })(event); }}>
        <Icon name="box" />{t.value.manageModels}
      </a>
    </Popover>
  );
}

function Row({ card, isChosen, onChoose }: { card: ModelCard; isChosen: boolean; onChoose: () => void }) {
  const status = statusOf(card);
  const busy = isBusy(card);
  const isAlias = firstOf(card) !== card;
  const isAdapter = card.parent !== undefined;
  return (
    <li class={isAdapter ? "model-row adapter" : "model-row"}>
      <button type="button" class="model-choice" aria-pressed={isChosen} onClick={onChoose}>
        <span class="model-id">{card.id}</span>
        <span class="model-facts">
          <StatusDot status={status} />
          {isAdapter ? t.value.adapterOf(card.parent!) : stateText(card)}
          {isAlias && ` · ${t.value.alias}`}
        </span>
        {!isAdapter && factsOf(card).map((line) => <span key={line} class="model-details">{line}</span>)}
        {busy && !isAdapter && <LoadingBar card={card} />}
      </button>
      {isChosen && <Icon name="check" />}
      {!isAlias && !isAdapter && <LoadButton card={card} />}
      {status === "failed" && <FailureNote card={card} />}
    </li>
  );
}

/** A path's last part; the whole name stands in the list. */
const shortName = (name: string): string => name.split("/").at(-1) || name;
