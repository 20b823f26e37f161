// SPDX-License-Identifier: MIT
// An answer token by token, shaded by how likely each one was; the one that is chosen shows what else was likely.

import { useState } from "preact/hooks";
import type { TokenLogprob } from "../api/types.ts";
import { formatNumber, t } from "../i18n/index.ts";

const PAGE = 2000;

export function Logprobs({ tokens }: { tokens: readonly TokenLogprob[] }) {
  const [chosen, choose] = useState<number>();
  const [count, setCount] = useState(PAGE);
  const token = chosen === undefined ? undefined : tokens[chosen];
  return (
    <div class="logprobs">
      <p class="token-text">
        {tokens.slice(0, count).map((one, index) => (
          <button type="button" key={index} class={`token p${level(one.logprob)}`} aria-pressed={index === chosen}
            title={percent(one.logprob)} onClick={() => choose(index)}>
            {one.token}
          </button>
        ))}
      </p>
      {tokens.length > count && <button type="button" class="button small" onClick={() => setCount(count + PAGE)}>{t.value.more}</button>}
      {token ? (
        <table class="alternatives">
          <caption>{t.value.alternatives}</caption>
          <tbody>
            {(token.top_logprobs?.length ? token.top_logprobs : [token]).map((one, index) => (
              <tr key={index} class={one.token === token.token ? "chosen" : ""}>
                <th scope="row"><code>{visible(one.token)}</code></th>
                <td>{percent(one.logprob)}</td>
                <td><meter min={0} max={1} value={Math.exp(one.logprob)} aria-label={percent(one.logprob)} /></td>
              </tr>
            ))}
          </tbody>
        </table>
      ) : (
        <p class="faint small">{t.value.chooseToken}</p>
      )}
    </div>
  );
}

/** 0 for what was certain to 4 for what was unlikely. */
function level(logprob: number): number {
  const probability = Math.exp(logprob);
  return probability > 0.9 ? 0 : probability > 0.6 ? 1 : probability > 0.3 ? 2 : probability > 0.1 ? 3 : 4;
}

const percent = (logprob: number): string => `${formatNumber(Math.exp(logprob) * 100, 1)} %`;

const visible = (token: string): string => token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
