// SPDX-License-Identifier: MIT
// What code of a page or a picture shows, where it can reach nothing: neither the network nor this page.
//
// The frame is a document of this server with a policy of its own, for one that is written here (srcdoc, data:, blob:)
// would inherit the policy of this page, under which no script of the code runs. It gets the code by a message.

import { useRef } from "preact/hooks";
import { t } from "../i18n/index.ts";

const PAGES = new Set(["html", "htm", "xhtml"]);
const CENTRED = "<style>body { display: grid; min-height: 100vh; margin: 0; place-items: center; } svg { max-width: 100%; height: auto; }</style>";

/** The document that shows the code; undefined where it is neither a page nor a picture. */
export function previewOf(language: string, text: string): string | undefined {
  const name = language.toLowerCase();
  if (PAGES.has(name)) return text;
  return (name === "svg" || name === "xml") && /^(?:\s|<[?!][^>]*>)*<svg[\s>]/i.test(text.slice(0, 2000)) ? CENTRED + text : undefined;
}

export function Preview({ source }: { source: string }) {
  const frame = useRef<HTMLIFrameElement>(null);
  const send = () => frame.current?.contentWindow?.postMessage(source, "*"); // it has no origin to be named by
  return (
    <div class="preview">
      <iframe ref={frame} sandbox="allow-scripts" referrerpolicy="no-referrer" src="preview.html" title={t.value.preview} onLoad={send} />
    </div>
  );
}
