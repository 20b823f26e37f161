// What the page says of a model that cannot answer yet: what is done with it, and how much of that.

import type { ModelCard } from "../api/types.ts";
import { formatNumber, named, t } from "../i18n/index.ts";
import { statusOf } from "../state/models.ts";

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

/** A model's name, what is done with it, and a bar. */
export function LoadingLine({ card }: { card: ModelCard }) {
  return (
    <div class="loading-line">
      <p><strong class="model-id">{card.id}</strong> <span>{stateText(card)}</span></p>
      <LoadingBar card={card} />
    </div>
  );
}
