// SPDX-License-Identifier: MIT
// A block of code: label, buttons, colours once it is whole.

import { useEffect, useState } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { CopyButton } from "../ui/CopyButton.tsx";
import { Icon } from "../ui/Icon.tsx";
import type { Coloured } from "./highlight.ts";
import { Preview, previewOf } from "./Preview.tsx";

const MAX_COLOURED = 40_000; // characters
const CHUNK = 64; // lines that are laid out together

export function CodeBlock({ text, language, closed }: { text: string; language: string; closed: boolean }) {
  const name = language.trim().split(/[\s,{:]/)[0]!.slice(0, 32);
  const coloured = useColours(text, name, closed);
  const [isPreviewed, setPreviewed] = useState(false);
  const preview = closed ? previewOf(name, text) : undefined;
  return (
    <figure class="code">
      <figcaption>
        <span class="language">{name || t.value.code}</span>
        <span class="spring" />
        {preview !== undefined && (
          <button type="button" class="icon-button copy" aria-pressed={isPreviewed} onClick={() => setPreviewed(!isPreviewed)}><Icon name="eye" />{t.value.preview}</button>
        )}
        <CopyButton text={() => text} label={t.value.copyCode} />
      </figcaption>
      <pre tabIndex={0} aria-label={t.value.codeIn(name)}>
        <code>{coloured ? nodes(coloured) : <Lines text={text} />}</code>
      </pre>
      {isPreviewed && preview !== undefined && <Preview source={preview} />}
    </figure>
  );
}

/** The coloured code, once there is no more to come and the highlighter is loaded. */
function useColours(text: string, name: string, closed: boolean): Coloured[] | undefined {
  const [coloured, setColoured] = useState<{ text: string; parts: Coloured[] }>();
  useEffect(() => {
    if (!closed || !name || text.length > MAX_COLOURED) return undefined;
    let wanted = true;
    void import("./highlight.ts").then(({ colour }) => {
      whenIdle(() => {
        const parts = wanted && colour(text, name);
        if (parts) setColoured({ text, parts });
      });
    }, () => undefined);
    return () => {
      wanted = false;
    };
  }, [text, name, closed]);
  return coloured?.text === text ? coloured.parts : undefined;
}

// Colours can wait for a pause in what is being written.
function whenIdle(work: () => void): void {
  if ("requestIdleCallback" in window) requestIdleCallback(work, { timeout: 2000 });
  else setTimeout(work);
}

// In chunks that are blocks of their own, so that a long listing that grows is laid out at its end alone.
function Lines({ text }: { text: string }) {
  const lines = text.split("\n");
  if (lines.length <= CHUNK) return <>{text}</>;
  const chunks: string[] = [];
  for (let at = 0; at < lines.length; at += CHUNK) chunks.push(lines.slice(at, at + CHUNK).join("\n"));
  return (
    <>
      {chunks.map((chunk, index) => (
        <span key={index} class="lines">
          {chunk + "\n"}
        </span>
      ))}
    </>
  );
}

const nodes = (parts: readonly Coloured[]) =>
  parts.map((part, index) =>
    typeof part === "string" ? (
      part
    ) : (
      <span key={index} class={part.scope}>
        {nodes(part.children)}
      </span>
    ),
  );
