// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import type { MathNode } from "../src/markdown/maths-nodes.ts";
import { readMaths } from "../src/markdown/maths.ts";

function outline(node: MathNode | string | undefined): string {
  if (node === undefined) return "?";
  if (typeof node === "string") return node;
  return `${node.tag}(${node.children.map(outline).join(" ")})`;
}
const read = (source: string) => outline(readMaths(source));

test("formulas become MathML", () => {
  assert.equal(read("x^2"), "msup(mi(x) mn(2))");
  assert.equal(read("a_i^{n+1}"), "msubsup(mi(a) mi(i) mrow(mi(n) mo(+) mn(1)))");
  assert.equal(read("\\frac{a}{b}"), "mfrac(mi(a) mi(b))");
  assert.equal(read("\\frac12"), "mfrac(mn(1) mn(2))");
  assert.equal(read("\\sqrt[3]{x}"), "mroot(mi(x) mn(3))");
  assert.equal(read("\\sum_{i=1}^n i"), "mrow(munderover(mo(∑) mrow(mi(i) mo(=) mn(1)) mi(n)) mi(i))");
  assert.equal(read("\\int_0^1"), "msubsup(mo(∫) mn(0) mn(1))");
  assert.equal(read("\\alpha \\le \\beta"), "mrow(mi(α) mo(≤) mi(β))");
  assert.equal(read("\\mathbb{R}^n"), "msup(mi(ℝ) mi(n))");
  assert.equal(read("\\mathbf{A1}"), "mrow(mi(𝐀) mn(𝟏))");
  assert.equal(read("\\text{if } x"), "mrow(mtext(if ) mi(x))");
  assert.equal(read("\\left(\\frac{a}{b}\\right)"), "mrow(mo(() mfrac(mi(a) mi(b)) mo()))");
  assert.equal(read("f'(x)"), "mrow(msup(mi(f) mo(′)) mo(() mi(x) mo()))");
  assert.equal(read("\\hat{y}"), "mover(mi(y) mo(^))");
  assert.equal(read("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"), "mrow(mo(() mtable(mtr(mtd(mn(1)) mtd(mn(2))) mtr(mtd(mn(3)) mtd(mn(4)))) mo()))");
  assert.equal(read("\\begin{cases}a & b\\\\ c & d\\end{cases}"), "mrow(mo({) mtable(mtr(mtd(mi(a)) mtd(mi(b))) mtr(mtd(mi(c)) mtd(mi(d)))))");
  assert.equal(read("3.14 - 2"), "mrow(mn(3.14) mo(−) mn(2))");
  assert.equal(read("\\lim_{x\\to 0}"), "munder(mo(lim) mrow(mi(x) mo(→) mn(0)))");
});

test("what models write often", () => {
  assert.equal(read("\\mathrm{H_2O}"), "mrow(msub(mi(H) mn(2)) mi(O))");
  assert.equal(readMaths("\\mathrm{H_2O}")!.children.every((one) => JSON.stringify(one).includes('"mathvariant":"normal"')), true);
  assert.equal(read("\\operatorname*{arg\\,max}_x"), "msub(mrow(mi(a) mi(r) mi(g) mspace() mi(m) mi(a) mi(x)) mi(x))");
  assert.equal(read("\\mathrm{kg}"), "mi(kg)");
  assert.equal(read("a &= b \\\\ c &= d"), "mtable(mtr(mtd(mi(a)) mtd(mrow(mo(=) mi(b)))) mtr(mtd(mi(c)) mtd(mrow(mo(=) mi(d)))))");
  assert.equal(read("a \\\\ b"), "mtable(mtr(mtd(mi(a))) mtr(mtd(mi(b))))");
  assert.equal(read("A \\xrightarrow[x]{\\Delta} B"), "mrow(mi(A) munderover(mo(→) mi(x) mi(Δ)) mi(B))");
  assert.equal(read("\\mathop{E}_x \\lt \\textcolor{red}{y}"), "mrow(msub(mi(E) mi(x)) mo(<) mi(y))");
  assert.equal(read("\\begin{dcases}a & b\\end{dcases}"), read("\\begin{cases}a & b\\end{cases}"));
});

test("what is not known is left as it was written", () => {
  for (const source of ["\\href{javascript:alert(1)}{x}", "\\unknown", "{", "}", "a}", "\\left( x", "\\frac{a}", "x^", "\\begin{tikz}\\end{tikz}", "\\begin{matrix}a\\end{cases}", "#", "\\", "\\constructor", "\\__proto__", "\\toString"]) {
    assert.equal(readMaths(source), undefined, source);
  }
});

test("depth and length are bounded", () => {
  assert.equal(readMaths("{".repeat(500) + "x" + "}".repeat(500)), undefined);
  assert.equal(readMaths("x^".repeat(500) + "x"), undefined);
  assert.equal(readMaths("\\sqrt".repeat(500) + "x"), undefined);
  assert.equal(readMaths("x".repeat(50_000)), undefined);
});

test("any text is read or refused, never an exception", () => {
  const parts = ["\\frac", "{", "}", "^", "_", "x", "\\left(", "\\right)", "&", "\\\\", "\\begin{matrix}", "\\end{matrix}", "'", "\\text{a}", "[", "]", "\\sqrt", " ", "1", "\\not", "\\mathbb"];
  let seed = 7;
  for (let round = 0; round < 3000; round++) {
    let source = "";
    for (let length = 0; length < 12; length++) {
      seed = (seed * 1103515245 + 12345) % 2147483648;
      source += parts[seed % parts.length];
    }
    readMaths(source);
  }
});
