// SPDX-License-Identifier: MIT
// The tree of a conversation's messages: branches are siblings, and what is shown is the path to one leaf.

import type { Message } from "./types.ts";

type Node = Pick<Message, "id" | "parent" | "created" | "role">;

export class MessageTree {
  private readonly nodes = new Map<string, Node>();
  private readonly children = new Map<string | null, string[]>();

  constructor(messages: Iterable<Node> = []) {
    const sorted = [...messages].sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
    for (const message of sorted) this.nodes.set(message.id, message);
    for (const message of sorted) this.link(message);
  }

  has(id: string): boolean {
    return this.nodes.has(id);
  }

  get(id: string): Node | undefined {
    return this.nodes.get(id);
  }

  get size(): number {
    return this.nodes.size;
  }

  add(message: Node): void {
    this.nodes.set(message.id, message);
    this.link(message);
  }

  /** Ids from the first message to `leaf`; none where there is no such message. */
  path(leaf: string | null): string[] {
    const ids: string[] = [];
    const seen = new Set<string>();
    for (let id = leaf; id !== null && !seen.has(id); ) {
      const node = this.nodes.get(id);
      if (!node) break;
      seen.add(id);
      ids.push(id);
      id = this.parentOf(node);
    }
    return ids.reverse();
  }

  /** Messages with the same parent, in the order of their making, the message itself among them. */
  siblings(id: string): readonly string[] {
    const node = this.nodes.get(id);
    return node ? (this.children.get(this.parentOf(node)) ?? []) : [];
  }

  /** The end of the branch that begins at a message, by the newest child at every fork. */
  leafBelow(id: string): string {
    const seen = new Set<string>();
    for (;;) {
      const below = this.children.get(id);
      if (!below?.length || seen.has(id)) return id;
      seen.add(id);
      id = below[below.length - 1]!;
    }
  }

  /** Takes out a message and all below it; returns their ids. */
  remove(id: string): string[] {
    const node = this.nodes.get(id);
    if (!node) return [];
    const removed: string[] = [];
    const queue = [id];
    for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
      if (!this.nodes.delete(next)) continue;
      removed.push(next);
      queue.push(...(this.children.get(next) ?? []));
      this.children.delete(next);
    }
    const parent = this.parentOf(node);
    const left = (this.children.get(parent) ?? []).filter((one) => one !== id);
    if (left.length) this.children.set(parent, left);
    else this.children.delete(parent);
    return removed;
  }

  /** The leaf to show after a message is gone: on its neighbour's branch, else its parent. */
  leafWithout(id: string): string | null {
    const node = this.nodes.get(id);
    if (!node) return null;
    const others = this.siblings(id);
    const at = others.indexOf(id);
    const neighbour = others[at - 1] ?? others[at + 1];
    return neighbour ? this.leafBelow(neighbour) : this.parentOf(node);
  }

  private link(message: Node): void {
    const parent = this.parentOf(message);
    const list = this.children.get(parent);
    if (!list) this.children.set(parent, [message.id]);
    else if (!list.includes(message.id)) this.children.set(parent, [...list, message.id]);
  }

  // A message whose parent is lost is shown as a first one rather than not at all.
  private parentOf(node: Node): string | null {
    return node.parent !== null && this.nodes.has(node.parent) && node.parent !== node.id ? node.parent : null;
  }
}
