// SPDX-License-Identifier: MIT
// The numbers under an answer.

import { statisticsOf } from "../chat/statistics.ts";
import type { AssistantMessage } from "../chat/types.ts";
import { formatNumber, formatSeconds, t } from "../i18n/index.ts";

export function Numbers({ message, isWriting }: { message: AssistantMessage; isWriting: boolean }) {
  const numbers = statisticsOf(message);
  if (!numbers) return null;
  const { prompt, cached, generated, reasoning, guessed, accepted, firstTokenMs, tokensPerSecond, seconds } = numbers;
  const lines = [
    t.value.promptTokens(formatNumber(prompt), formatNumber(cached)),
    t.value.generatedTokens(formatNumber(generated), formatNumber(reasoning)),
    ...(guessed > 0 ? [t.value.guessedTokens(formatNumber(guessed), formatNumber(accepted))] : []),
    ...(firstTokenMs === undefined ? [] : [t.value.firstToken(formatSeconds(firstTokenMs / 1000))]),
    ...(seconds ? [t.value.inAll(formatSeconds(seconds))] : []),
    message.model,
  ];
  return (
    <details class="numbers">
      <summary data-tip={t.value.tips.numbers}>
        <span class="off-screen">{t.value.numbersOf}</span>
        {tokensPerSecond !== undefined && !isWriting && <span>{formatNumber(tokensPerSecond, tokensPerSecond < 100 ? 1 : 0)} {t.value.perSecond}</span>}
        <span>{t.value.tokens(formatNumber(generated))}</span>
      </summary>
      <ul>{lines.map((line) => <li key={line}>{line}</li>)}</ul>
    </details>
  );
}
