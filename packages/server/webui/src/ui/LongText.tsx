// SPDX-License-Identifier: MIT
// Text of any length would take seconds to lay out: a long one is shown by its beginning at first.

import { useState } from "preact/hooks";
import { t } from "../i18n/index.ts";

const SHOWN = 10_000; // characters at first

export function LongText({ class: name, text }: { class: string; text: string }) {
  const [count, setCount] = useState(SHOWN);
  return (
    <div class={name} dir="auto">
      {text.length > count ? `${text.slice(0, count)}…` : text}
      {text.length > count && (
        <button type="button" class="button small" onClick={() => setCount(count * 10)}>{t.value.more}</button>
      )}
    </div>
  );
}
