// The models: which one answers, and loading and unloading them.

import { useEffect, useState } from "preact/hooks";
import type { ModelCard } from "../api/types.ts";
import { formatBytes, formatCount, formatNumber, t } from "../i18n/index.ts";
import { confirmFirst } from "../state/dialogs.ts";
import { cardFor, connection, isBusy, models, refreshModels, statusOf } from "../state/models.ts";
import { changeStart, shownStart } from "../state/new-chat.ts";
import { prefer } from "../state/preferences.ts";
import { Icon } from "./Icon.tsx";
import { change, FailureNote, LoadingBar, stateText } from "./ModelState.tsx";
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
    </Popover>
  );
}

function Row({ card, isChosen, onChoose }: { card: ModelCard; isChosen: boolean; onChoose: () => void }) {
  const status = statusOf(card);
  const busy = isBusy(card);
  const unload = () => confirmFirst({
    title: t.value.unloadSure(card.id), text: t.value.unloadText, action: t.value.unload, onConfirm: () => change(card.id, "unloading"),
  });
  const isAlias = card.root !== undefined && models.value.some((one) => one !== card && one.root === card.root && models.value.indexOf(one) < models.value.indexOf(card));
  return (
    <li class="model-row">
      <button type="button" class="model-choice" aria-pressed={isChosen} onClick={onChoose}>
        <span class="model-id">{card.id}</span>
        <span class="model-facts">
          <StatusDot status={status} />
          {stateText(card)}
          {isAlias && ` · ${t.value.alias}`}
        </span>
        {factsOf(card).map((line) => <span key={line} class="model-details">{line}</span>)}
        {busy && <LoadingBar card={card} />}
      </button>
      {isChosen && <Icon name="check" />}
      {!busy && !isAlias && (status === "ready" ? (
        <button type="button" class="button small" aria-label={t.value.unloadOf(card.id)} onClick={unload}>{t.value.unload}</button>
      ) : status !== "failed" && status !== "away" && (
        <button type="button" class="button small" aria-label={t.value.loadOf(card.id)} onClick={() => change(card.id, "loading")}>{t.value.load}</button>
      ))}
      {status === "failed" && <FailureNote card={card} />}
    </li>
  );
}

/** What is known of a loaded model, in lines. */
function factsOf(card: ModelCard): string[] {
  const { architecture, num_parameters: parameters, quantization, dtype, max_model_len: context, weight_bytes: weights, kv_cache_bytes: cache } = card;
  const facts = [
    architecture,
    parameters && t.value.parameters(formatCount(parameters)),
    (quantization && mainType(quantization)) ?? dtype,
    context && t.value.contextTokens(formatNumber(context)),
  ];
  const memory = weights && (cache ? t.value.memoryOf(formatBytes(weights), formatBytes(cache)) : t.value.memoryOfWeights(formatBytes(weights)));
  return [facts.filter(Boolean).join(" · "), memory || ""].filter(Boolean);
}

/** Of "F32 x 61, Q4_1 x 40" the type that most of its weights have: plain numbers are norms and biases. */
const mainType = (types: string): string | undefined =>
  types.split(", ").map((type) => type.split(" x ", 1)[0]!).find((type) => !/^(B?F(16|32|64)|I64)$/.test(type));

function StatusDot({ status }: { status: string }) {
  const kind = status === "ready" ? "good" : status === "failed" ? "bad" : status === "unloaded" || status === "away" ? "off" : "busy";
  return <span class={`dot ${kind}`} aria-hidden="true" />;
}

/** A path's last part; the whole name stands in the list. */
const shortName = (name: string): string => name.split("/").at(-1) || name;
