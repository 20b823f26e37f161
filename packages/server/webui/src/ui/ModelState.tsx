// SPDX-License-Identifier: MIT
// What the page says of a model: what is known of it, what is done with it and how much of that, or why it failed.

import { errorInfo, sayable } from "../api/http.ts";
import type { ModelCard } from "../api/types.ts";
import { formatBytes, formatCount, formatNumber, named, t } from "../i18n/index.ts";
import { confirmFirst } from "../state/dialogs.ts";
import { changeModel, failures, isBusy, statusOf } from "../state/models.ts";
import { notify } from "../state/notices.ts";
import { describe, describeFailure, NOT_LOADED } from "./errors.ts";
import { Icon } from "./Icon.tsx";

/** What is done with a model now, as "loading the weights, 43 %". */
export function stateText(card: ModelCard): string {
  const status = statusOf(card);
  if (status !== "loading" || !card.loading) return named(t.value.modelStates, status) ?? status;
  const { what, percent } = card.loading;
  // The server says it in English, and a step is known by its first word.
  const step = named(t.value.loadingSteps, what.split(/\W/, 1)[0]!) ?? t.value.loadingSteps.loading;
  return percent === null ? `${step}…` : `${step}, ${formatNumber(percent)} %`;
}

export function LoadingBar({ card }: { card: ModelCard }) {
  const percent = statusOf(card) === "loading" ? card.loading?.percent : null;
  return <progress max={100} value={percent ?? undefined} aria-label={t.value.loadingOf(card.id)} />;
}

/** What is known of a model, in lines. */
export function factsOf(card: Partial<ModelCard>): string[] {
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

export function StatusDot({ status }: { status: string }) {
  const kind = status === "ready" ? "good" : status === "failed" ? "bad" : status === "unloaded" || status === "away" ? "off" : "busy";
  return <span class={`dot ${kind}`} aria-hidden="true" />;
}

/** Loads or unloads a model, as far as its state allows one of them; unloading asks first. */
export function LoadButton({ card }: { card: ModelCard }) {
  const status = statusOf(card);
  const unload = () => confirmFirst({
    title: t.value.unloadSure(card.id), text: t.value.unloadText, action: t.value.unload, onConfirm: () => change(card.id, "unloading"),
  });
  if (isBusy(card) || status === "failed" || status === "away") return null;
  return status === "ready" ? (
    <button type="button" class="button small" aria-label={t.value.unloadOf(card.id)} onClick={unload}>{t.value.unload}</button>
  ) : (
    <button type="button" class="button small" aria-label={t.value.loadOf(card.id)} onClick={() => change(card.id, "loading")}>{t.value.load}</button>
  );
}

/** A model's name, what is done with it, and a bar. */
export function LoadingLine({ card }: { card: ModelCard }) {
  return (
    <div class="loading-line">
      <p><strong class="model-id">{card.id}</strong>: {stateText(card)}</p>
      <LoadingBar card={card} />
    </div>
  );
}

/** Why a model could not be loaded, and another try. */
export function FailureNote({ card }: { card: ModelCard }) {
  const said = sayable(failures.value[card.id]);
  return (
    <div class="notice error" role="group" aria-label={t.value.couldNotLoad(card.id)}>
      <Icon name="warning" />
      <div>
        <p>{describeFailure(card)}</p>
        {said && <details class="small"><summary>{t.value.serverSays}</summary><p>{said}</p></details>}
      </div>
      <button type="button" class="button small" aria-label={t.value.loadAgain(card.id)} onClick={() => change(card.id, "loading")}>{t.value.retry}</button>
    </div>
  );
}

/** Loads or unloads a model. That it could not be loaded, its card says from then on; other failures are said here. */
export function change(id: string, work: "loading" | "unloading"): void {
  changeModel(id, work).catch((error) => {
    const info = errorInfo(error);
    if (info.code !== NOT_LOADED) notify("error", `${id}: ${describe(info)}`, () => change(id, work));
  });
}
