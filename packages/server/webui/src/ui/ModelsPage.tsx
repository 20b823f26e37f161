// SPDX-License-Identifier: MIT
// The models page: which models the server has, what they take and whether they fit, and fetching and removing them.

import { useEffect } from "preact/hooks";
import { errorInfo } from "../api/http.ts";
import { selectModel } from "../api/server.ts";
import type { ModelCard, StockedModel } from "../api/types.ts";
import { formatBytes, named, t } from "../i18n/index.ts";
import { confirmFirst } from "../state/dialogs.ts";
import { described, inventory, inventoryError, removeModel, watchInventory } from "../state/inventory.ts";
import { connection, firstOf, isBusy, models, refreshModels, statusOf } from "../state/models.ts";
import { changeStart } from "../state/new-chat.ts";
import { notify } from "../state/notices.ts";
import { prefer } from "../state/preferences.ts";
import { go } from "../state/route.ts";
import { AddModels } from "./AddModels.tsx";
import { describe } from "./errors.ts";
import { Icon } from "./Icon.tsx";
import { Menu } from "./Menu.tsx";
import { factsOf, FailureNote, LoadButton, LoadingBar, StatusDot, stateText } from "./ModelState.tsx";
import { SidebarButton } from "./SidebarButton.tsx";

export function ModelsPage() {
  useEffect(watchInventory, []);
  const stock = inventory.value;
  const firsts = models.value.filter((card) => card.parent === undefined && firstOf(card) === card);
  return (
    <>
      <header class="page-head"><SidebarButton /><h1>{t.value.models}</h1></header>
      <div class="scroller"><div class="page">
        {stock && <p class="faint">{t.value.roomLeft(formatBytes(stock.memoryFree), formatBytes(stock.diskFree))}</p>}
        {!firsts.length && <p class="faint">{connection.value === "connecting" ? t.value.connecting : t.value.noModelYet}</p>}
        <ul class="stock">
          {firsts.map((card) => <Row key={card.id} card={card} stocked={stock?.models.find(({ id }) => id === card.id)} />)}
        </ul>
        {stock ? <AddModels stock={stock} /> : connection.value === "ready" && inventoryError.value && (
          <div class="notice"><Icon name="info" /><p>{describe(inventoryError.value)}</p></div>
        )}
      </div></div>
    </>
  );
}

function Row({ card, stocked }: { card: ModelCard; stocked: StockedModel | undefined }) {
  const known = described.value[card.id];
  const others = models.value.filter((one) => one !== card && firstOf(one) === card).map(({ id }) => id);
  const adapters = models.value.filter(({ parent }) => parent === card.id).map(({ id }) => id);
  const facts = factsOf({ ...known, ...card });
  const room = stocked && statusOf(card) !== "ready" && roomOf(stocked); // what a loaded one takes, its facts say
  const formats = [card.tool_parser && `${t.value.toolFormat}: ${card.tool_parser}`, card.reasoning_parser && `${t.value.reasoningFormat}: ${card.reasoning_parser}`].filter(Boolean);
  return (
    <li class="card">
      <header>
        <StatusDot status={statusOf(card)} />
        <h2>{card.id}</h2>
        <span class="faint small">{stateText(card)}</span>
        {card.default && <span class="tag">{t.value.modelDefault}</span>}
        <span class="spring" />
        <LoadButton card={card} />
        <Menu label={t.value.actionsOf(card.id)} items={actionsOf(card, stocked)} />
      </header>
      <div class="model-details">
        {others.length > 0 && <p>{t.value.alsoCalled(others.join(", "))}</p>}
        {adapters.length > 0 && <p>{t.value.adaptersAre(adapters.join(", "))}</p>}
        {facts.map((line) => <p key={line}>{line}</p>)}
        {room && <p class={stocked?.fits === "never" ? "wrong" : undefined}>{room}</p>}
        {formats.length > 0 && <p>{formats.join(" · ")}</p>}
        {known === null && <p class="wrong">{t.value.cannotServe}</p>}
      </div>
      {isBusy(card) && <LoadingBar card={card} />}
      {statusOf(card) === "failed" && <FailureNote card={card} />}
    </li>
  );
}

/** What the files take, what they need in memory and whether that is there. */
function roomOf({ size, needed, fits }: StockedModel): string {
  if (!size || !needed) return t.value.notHereYet;
  const files = t.value.sizeIs(formatBytes(size));
  return `${files} · ${needs(needed, fits)}`;
}

export const needs = (needed: number, fits: string | null): string =>
  [t.value.needs(formatBytes(needed)), fits && named(t.value.fits, fits)].filter(Boolean).join(": ");

function actionsOf(card: ModelCard, stocked: StockedModel | undefined) {
  const failed = (error: unknown) => notify("error", `${card.id}: ${describe(errorInfo(error))}`);
  const chat = () => {
    prefer({ model: card.id });
    go({ page: "chat", id: null });
    changeStart({ model: card.id });
  };
  const remove = () => confirmFirst({
    title: t.value.removeSure(card.id), text: t.value.removeText(formatBytes(stocked?.size ?? 0)), action: t.value.remove,
    onConfirm: () => {
      removeModel(card).catch(failed);
    },
  });
  return [
    { icon: "plus" as const, label: t.value.chatWith, run: chat },
    ...(card.default ? [] : [{ icon: "check" as const, label: t.value.makeDefault, run: () => void selectModel(card.id).then(refreshModels).catch(failed) }]),
    ...(stocked?.removable && inventory.value?.changes ? [{ icon: "trash" as const, label: t.value.removeModel, run: remove }] : []),
  ];
}
