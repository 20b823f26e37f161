// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { MessageTree } from "../src/chat/tree.ts";
import type { UserMessage } from "../src/chat/types.ts";

let time = 0;
const node = (id: string, parent: string | null): UserMessage => ({ id, parent, role: "user", created: ++time, text: id });

const sample = () => new MessageTree([node("a", null), node("b", "a"), node("c", "b"), node("b2", "a"), node("c2", "b2"), node("d2", "c2")]);

test("paths and siblings", () => {
  const tree = sample();
  assert.deepEqual(tree.path("c"), ["a", "b", "c"]);
  assert.deepEqual(tree.path("d2"), ["a", "b2", "c2", "d2"]);
  assert.deepEqual(tree.path(null), []);
  assert.deepEqual(tree.path("nobody"), []);
  assert.deepEqual(tree.siblings("b"), ["b", "b2"]);
  assert.deepEqual(tree.siblings("a"), ["a"]);
  assert.equal(tree.leafBelow("a"), "d2");
  assert.equal(tree.leafBelow("b"), "c");
});

test("a new sibling is the last", () => {
  const tree = sample();
  tree.add(node("b3", "a"));
  assert.deepEqual(tree.siblings("b"), ["b", "b2", "b3"]);
  assert.equal(tree.leafBelow("a"), "b3");
});

test("removal takes what is below and shows a neighbour", () => {
  const tree = sample();
  assert.equal(tree.leafWithout("b2"), "c");
  assert.deepEqual(tree.remove("b2").sort(), ["b2", "c2", "d2"]);
  assert.deepEqual(tree.siblings("b"), ["b"]);
  assert.equal(tree.leafWithout("c"), "b");
  assert.equal(tree.leafWithout("a"), null);
  assert.equal(tree.remove("a").length, 3);
  assert.equal(tree.size, 0);
  assert.deepEqual(tree.remove("a"), []);
});

test("order of siblings is that of making, whatever the order of reading", () => {
  const [a, x, y] = [node("a", null), node("x", "a"), node("y", "a")];
  assert.deepEqual(new MessageTree([y, x, a]).siblings("x"), ["x", "y"]);
});

test("broken trees are shown as well as can be", () => {
  const orphan = new MessageTree([node("lost", "gone"), node("child", "lost")]);
  assert.deepEqual(orphan.path("child"), ["lost", "child"]);
  const self = new MessageTree([node("s", "s")]);
  assert.deepEqual(self.path("s"), ["s"]);
  const circle = new MessageTree([node("p", "q"), node("q", "p")]);
  assert.equal(circle.path("p").length, 2);
  assert.ok(["p", "q"].includes(circle.leafBelow("p")));
  assert.equal(circle.remove("p").length, 2);
});
