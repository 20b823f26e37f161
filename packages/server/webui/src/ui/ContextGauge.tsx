// SPDX-License-Identifier: MIT
// How much of the model's context the conversation fills.

import { contextTokens } from "../chat/statistics.ts";
import { formatNumber, t } from "../i18n/index.ts";
import { current } from "../state/chats.ts";
import { cardFor } from "../state/models.ts";
import { shownStart } from "../state/new-chat.ts";

const CIRCUMFERENCE = 2 * Math.PI * 8;

export function ContextGauge() {
  const chat = current.value;
  const answer = chat?.lastAnswer;
  const used = answer ? contextTokens(answer) : undefined;
  const most = cardFor(shownStart.value.model)?.max_model_len;
  if (used === undefined || !most) return null;
  const share = Math.min(1, used / most);
  const text = t.value.contextOf(formatNumber(used), formatNumber(most));
  const kind = share > 0.9 ? "full" : share > 0.75 ? "filling" : "";
  return (
    <span class={`gauge ${kind}`} role="img" aria-label={text} data-tip={text}>
      <svg viewBox="0 0 20 20" aria-hidden="true">
        <circle cx="10" cy="10" r="8" class="gauge-track" />
        <circle cx="10" cy="10" r="8" class="gauge-fill" stroke-dasharray={`${share * CIRCUMFERENCE} ${CIRCUMFERENCE}`} transform="rotate(-90 10 10)" />
      </svg>
      <span aria-hidden="true">{formatNumber(share * 100)} %</span>
    </span>
  );
}
