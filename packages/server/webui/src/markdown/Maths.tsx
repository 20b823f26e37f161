// SPDX-License-Identifier: MIT
// A formula: MathML, or what was written where that is not understood.

import { createElement, type VNode } from "preact";
import type { MathNode } from "./maths-nodes.ts";
import { readMaths } from "./maths.ts";

export function Maths({ text, display }: { text: string; display: boolean }) {
  const read = readMaths(text);
  if (!read) return <code class={display ? "formula display" : "formula"}>{text}</code>;
  const formula = createElement("math", display ? { display: "block" } : {}, view(read));
  if (!display) return formula;
  return <span class="formula-frame">{formula}</span>;
}

function view(node: MathNode | string): VNode | string {
  if (typeof node === "string") return node;
  return createElement(node.tag, node.attributes ?? {}, ...node.children.map(view));
}
