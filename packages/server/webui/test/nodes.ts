// SPDX-License-Identifier: MIT
// Draws nodes without a page: what the components would make, as plain objects and as text.

import type { Tokens } from "marked";
import type { ComponentChildren, VNode } from "preact";
import { blockNode } from "../src/markdown/Markdown.tsx";
import { readBlocks } from "../src/markdown/blocks.ts";
import { CodeBlock } from "../src/markdown/CodeBlock.tsx";

export interface Drawn {
  name: string;
  attributes: Record<string, unknown>;
  children: (Drawn | string)[];
}

export function draw(node: ComponentChildren): (Drawn | string)[] {
  if (node === null || node === undefined || typeof node === "boolean") return [];
  if (Array.isArray(node)) return node.flatMap(draw);
  if (typeof node !== "object") return [String(node)];
  const { type, props } = node as VNode<Record<string, unknown>>;
  const { children, ...attributes } = props;
  if (typeof type === "string") return [{ name: type, attributes, children: draw(children as ComponentChildren) }];
  if (type === (CodeBlock as unknown)) return [{ name: "code-block", attributes, children: [String(props.text)] }];
  const component = type as unknown as { prototype?: { render?: unknown } };
  if (component.prototype?.render) {
    const made = new (type as unknown as new (props: unknown) => { props: unknown; render(): ComponentChildren })(props);
    made.props = props;
    return draw(made.render());
  }
  return draw((type as (props: unknown) => ComponentChildren)(props));
}

export const drawMarkdown = (source: string): (Drawn | string)[] => readBlocks(source).flatMap((block) => draw(blockNode(block, false, block.type === "heading" ? (block as Tokens.Heading).depth : undefined)));

export function every(nodes: readonly (Drawn | string)[]): Drawn[] {
  return nodes.flatMap((node) => (typeof node === "string" ? [] : [node, ...every(node.children)]));
}

export function textOf(nodes: readonly (Drawn | string)[]): string {
  return nodes.map((node) => (typeof node === "string" ? node : textOf(node.children))).join("");
}

/** `<p>a <strong>b</strong></p>`, without attributes. */
export function outline(nodes: readonly (Drawn | string)[]): string {
  return nodes.map((node) => (typeof node === "string" ? node : `<${node.name}>${outline(node.children)}</${node.name}>`)).join("");
}
