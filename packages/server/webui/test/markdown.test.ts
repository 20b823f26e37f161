// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Tokens } from "marked";
import { GrowingBlocks, isFenceClosed, isTooMuch, readBlocks } from "../src/markdown/blocks.ts";
import { safeLink, safePicture } from "../src/markdown/links.ts";
import { escapeUnseen } from "../src/markdown/unseen.ts";
import { growth } from "./growth.ts";
import { drawMarkdown, every, outline, textOf } from "./nodes.ts";
import { previewOf } from "../src/markdown/Preview.tsx";

const SAMPLES = [
  "# One\n\ntext *a* **b** `c`\nmore\n\n## Two\n\n- a\n- b\n\n  c\n- d\n\n1. x\n\n2. y\n\n3. z\n\nend",
  "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 | `4` |\n\nafter\n\n> quote\n> more\n\n---\n\nlast line\n",
  "Text\n\n```python\nprint('hi')\n\n# no heading\n```\n\nText\n\n~~~\nopen to the end\n- no list",
  "$$\nx^2\n$$\n\nand $a+b$ but $5 and $6 are prices\n\n\\[ y \\]\n\n\\(z\\)",
  "A [link] and [another](https://b.example).\n\ntext\n\n[link]: https://a.example\n",
  "- one\n    - two\n        - three\n\nSetext\n===\n\n    indented code\n\n    more\n\n* * *\n\nümlaut 🙂 text\r\nwindows\r\n\r\nline",
  "- [ ] open\n- [x] done\n\n<div>\n\n**bold** in HTML\n\n</div>\n\ntext<br>next",
];

test("what grows ends as the whole text, however it is cut", () => {
  for (const sample of SAMPLES) {
    const wanted = JSON.stringify(readBlocks(sample));
    for (let cut = 1; cut <= sample.length; cut++) {
      const growing = new GrowingBlocks();
      for (let at = cut; at < sample.length; at += cut) growing.update(sample.slice(0, at), false);
      assert.equal(JSON.stringify(growing.update(sample, true)), wanted, `cut every ${cut}: ${sample.slice(0, 30)}`);
    }
  }
});

test("at every moment the blocks are those of the text so far", () => {
  for (const sample of SAMPLES.filter((one) => !one.includes("]:"))) {
    const growing = new GrowingBlocks();
    for (let at = 1; at <= sample.length; at++) {
      const shown = growing.update(sample.slice(0, at), false).map((block) => block.raw.trim()).join("\n");
      assert.equal(shown, readBlocks(sample.slice(0, at)).map((block) => block.raw.trim()).join("\n"));
    }
  }
});

test("finished blocks stay the same objects and the last one alone is read", () => {
  const growing = new GrowingBlocks();
  const text = Array.from({ length: 50 }, (_, index) => `Paragraph ${index}.\n\n`).join("");
  const before = growing.update(text + "and", false);
  const after = growing.update(text + "and more", false);
  assert.equal(after.length, 51);
  for (let index = 0; index < 49; index++) assert.equal(after[index], before[index]);
  const closed = growing.update(text + "and more", true);
  assert.equal(closed[10], before[10]);
});

test("a long list grows in parts with all its items and numbers", () => {
  for (const mark of [(index: number) => `${index}. `, () => "1. ", () => "- "]) {
    const text = Array.from({ length: 300 }, (_, index) => `${mark(index + 1)}item **${index}**\n`).join("") + "\nend";
    const growing = new GrowingBlocks();
    let most = 0;
    for (let at = 7; at < text.length; at += 7) {
      const lists = growing.update(text.slice(0, at), false).filter((block): block is Tokens.List => block.type === "list");
      most = Math.max(most, lists.length);
      let next = 1;
      for (const list of lists) {
        if (list.ordered) assert.equal(list.start, next);
        next += list.items.length;
      }
    }
    assert.ok(most > 3);
    const [whole, end] = readBlocks(text) as [Tokens.List, Tokens.Paragraph];
    const blocks = growing.update(text, true);
    const raws = (lists: readonly Tokens.List[]) => lists.flatMap((list) => list.items.map((item) => item.raw.trim()));
    assert.deepEqual(raws(blocks.slice(0, -1) as Tokens.List[]), raws([whole]));
    assert.deepEqual(blocks.at(-1), end);
  }
});

test("a text that is not the old one with more begins anew", () => {
  const growing = new GrowingBlocks();
  growing.update("# a\n\nb\n\nc\n", false);
  assert.deepEqual(growing.update("other", false), readBlocks("other"));
});

test("fences", () => {
  assert.ok(isFenceClosed("```py\na\n```\n"));
  assert.ok(isFenceClosed("````\n```\n````"));
  assert.ok(!isFenceClosed("````\n```\n"));
  assert.ok(!isFenceClosed("```py\na"));
  assert.ok(isFenceClosed("    indented"));
});

test("GFM becomes elements", () => {
  assert.equal(outline(drawMarkdown("a **b** _c_ ~~d~~ `e`")), "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e</code></p>");
  assert.equal(outline(drawMarkdown("# A\n## B")), "<h3>A</h3><h4>B</h4>");
  assert.equal(outline(drawMarkdown("- a\n- b")), "<ul><li><span>a</span></li><li><span>b</span></li></ul>");
  assert.equal(every(drawMarkdown("4. a\n5. b"))[0]!.attributes.start, 4);
  assert.match(outline(drawMarkdown("|a|b|\n|-|-|\n|1|2|")), /<table><thead><tr><th>a<\/th><th>b<\/th><\/tr><\/thead><tbody><tr><td>1<\/td><td>2<\/td>/);
  assert.equal(textOf(drawMarkdown("&lt;b&gt; &amp;amp; &#65; &nosuch; \\*x\\*")), "<b> &amp; A &nosuch; *x*");
  assert.equal(outline(drawMarkdown("a<br>b")), "<p>a<br></br>b</p>");
  assert.equal(outline(drawMarkdown("a<br>\nb")), "<p>a<br></br>b</p>");
  assert.equal(outline(drawMarkdown("> a\n>\n> b")), "<blockquote><p>a</p><p>b</p></blockquote>");
  const boxes = every(drawMarkdown("- [ ] a\n- [x] b")).filter((node) => node.name === "input");
  assert.deepEqual(boxes.map((box) => box.attributes.checked), [false, true]);
});

const CORPUS = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "<svg onload=alert(1)><script>alert(2)</script></svg>",
  "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
  "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
  "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
  "<a href='javascript:alert(1)'>x</a>",
  "<style>*{background:url(https://evil.example)}</style>",
  "<details open ontoggle=alert(1)>",
  "<base href='https://evil.example/'>",
  "<form action=https://evil.example><input type=submit>",
  "[a](javascript:alert(1))",
  "[a](JaVaScRiPt:alert(1))",
  "[a](java\tscript:alert(1))",
  "[a](&#106;avascript:alert(1))",
  "[a](javascript&colon;alert(1))",
  "[a](\u0001javascript:alert(1))",
  "[a](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
  "[a](vbscript:msgbox(1))",
  "[a](file:///etc/passwd)",
  "[a](//evil.example)",
  "[a](/v1/models/unload)",
  "[a](#/server)",
  "<javascript:alert(1)>",
  "[a]: javascript:alert(1)\n\n[a]",
  "![x](https://evil.example/?q=secret)",
  "![x](javascript:alert(1))",
  "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+)",
  "![x\" onerror=\"alert(1)](https://evil.example/a.png)",
  "```\"><script>alert(1)</script>\n<script>alert(1)</script>\n```",
  "`<img src=x onerror=alert(1)>`",
  "| <script>alert(1)</script> |\n|---|\n| <img src=x onerror=alert(1)> |",
  "${alert(1)} {{constructor.constructor('alert(1)')()}} #{alert(1)} <%= alert(1) %>",
  "$\\href{javascript:alert(1)}{x}$ $$\\url{javascript:alert(1)}$$ $\\htmlClass{x}{y}$",
  "$<img src=x onerror=alert(1)>$ $\\text{<script>alert(1)</script>}$",
  "<!--><img src=x onerror=alert(1)>-->",
  "]]><script>alert(1)</script>",
  "<x/onclick=alert(1)>click",
  "# <img src=x onerror=alert(1)>\n- <script>alert(1)</script>\n> <svg/onload=alert(1)>",
];
const ELEMENTS = new Set([
  "p", "strong", "em", "del", "code", "code-block", "br", "a", "span", "h3", "h4", "h5", "h6", "ul", "ol", "li", "input",
  "blockquote", "hr", "div", "table", "thead", "tbody", "tr", "th", "td", "img", "math", "mrow", "mi", "mn", "mo", "mtext",
]);
const ATTRIBUTES = new Set([
  "class", "dir", "href", "title", "target", "rel", "src", "alt", "start", "type", "checked", "disabled", "aria-label", "scope",
  "role", "tabIndex", "text", "language", "closed", "display", "mathvariant", "stretchy",
]);

test("hostile texts become text and nothing else", () => {
  for (const source of CORPUS) {
    for (const node of every(drawMarkdown(source))) {
      assert.ok(ELEMENTS.has(node.name), `${source} made <${node.name}>`);
      for (const name of Object.keys(node.attributes)) assert.ok(ATTRIBUTES.has(name), `${source} made ${name}=`);
      const { href, src } = node.attributes;
      if (href !== undefined) assert.match(String(href), /^(?:https?|mailto):/, source);
      assert.ok(src === undefined || String(src).startsWith("data:image/png"), source);
    }
  }
});

test("links and pictures by scheme", () => {
  assert.equal(safeLink("https://example.org/ä b"), "https://example.org/%C3%A4%20b");
  assert.equal(safeLink("mailto:a@b.example"), "mailto:a@b.example");
  for (const bad of ["javascript:1", " javascript:1", "java\nscript:1", "data:text/html,x", "/a", "a", "//a.example", "blob:https://a/b", "ftp://a.example", "x".repeat(5000)]) {
    assert.equal(safeLink(bad), undefined, bad);
  }
  assert.ok(safePicture("data:image/png;base64,AAAA"));
  for (const bad of ["https://a.example/x.png", "data:image/svg+xml;base64,AAAA", "data:image/png,x", "javascript:1"]) {
    assert.equal(safePicture(bad), undefined, bad);
  }
});

test("what would take too long is plain text", () => {
  assert.ok(isTooMuch("> ".repeat(100) + "x"));
  assert.ok(isTooMuch("- ".repeat(100) + "x"));
  assert.ok(isTooMuch("x".repeat(2_000_000)));
  assert.ok(!isTooMuch("- a\n".repeat(1000)));
});

test("no text takes long", () => {
  const hostile: (readonly [string, string?])[] = [
    ["*"], ["_a "], ["["], ["!["], ["`"], ["$"], ["$a "], ["\\("], ["<a "], ["[a]("], ["~"], ["a\n"], ["|a", "|-"],
  ];
  for (const [part, row] of hostile) {
    const ratio = growth((length) => {
      const line = part.repeat(length / part.length / 2);
      const source = row ? `${line}\n${row.repeat(length / row.length / 2)}` : line;
      if (!isTooMuch(source)) readBlocks(source);
    });
    assert.ok(ratio < 9, `${part}: ${ratio}`);
  }
});

test("a long rule is a rule, and deep containers stay text", () => {
  for (const rule of ["-".repeat(40), "*".repeat(40), "_".repeat(80)]) {
    assert.equal(isTooMuch(`above\n\n${rule}\n\nbelow`), false, rule);
  }
  for (const deep of [">".repeat(40), "- ".repeat(40), "1. ".repeat(40), "> - ".repeat(20)]) assert.equal(isTooMuch(deep), true, deep);
});

test("a paragraph full of marks is read in time that grows with its length", () => {
  for (const marks of ["*a_", "_a", "$", "$$", "$$a", "![", "[", "\\[", "\\(a", "<", "`", "a $$\n"]) {
    assert.ok(growth((length) => readBlocks(marks.repeat(length / marks.length))) < 9, marks);
  }
  assert.equal(outline(drawMarkdown("a **b** c ".repeat(100))).includes("strong"), true);
});

test("characters that nobody sees are written out", () => {
  assert.equal(escapeUnseen("a\u202eb\u200bc\u0000\u{e0041}\n\t ü 🙂"), "a\\u{202e}b\\u{200b}c\\u{0}\\u{e0041}\n\t ü 🙂");
});

test("pages and pictures have a preview, nothing else has, and hostile beginnings are read fast", () => {
  assert.equal(previewOf("HTML", "<p>x"), "<p>x");
  for (const text of ["<svg></svg>", '<?xml version="1.0"?>\n<!-- a -->\n<!DOCTYPE svg>\n<SVG >']) {
    for (const language of ["svg", "xml"]) assert.ok(previewOf(language, text)?.endsWith(text), text);
  }
  for (const [language, text] of [["xml", "<a><svg/></a>"], ["svg", "text"], ["js", "<svg/>"], ["", "<svg/>"], ["xml", "<svgx/>"]] as const) assert.equal(previewOf(language, text), undefined);
  for (const part of ["<!---->", "<!", " ", "<?"]) {
    assert.ok(growth((length) => assert.equal(previewOf("svg", part.repeat(length / part.length)), undefined)) < 9, part);
  }
});

test("emphasis beside Chinese, Japanese and Korean punctuation", () => {
  const rows: [string, string][] = [
    ["他说**「重要」**的事", "他说<strong>「重要」</strong>的事"], ["**加粗（x）**后面", "<strong>加粗（x）</strong>后面"],
    ["**중요(주의)**입니다", "<strong>중요(주의)</strong>입니다"], ["これは**「強調」**です", "これは<strong>「強調」</strong>です"],
    ["*斜体（x）*后面", "<em>斜体（x）</em>后面"], ["~~删除线（test）~~后面", "<del>删除线（test）</del>后面"],
    ["他说**“重要”**的事", "他说<strong>“重要”</strong>的事"], ["**粗体**中文", "<strong>粗体</strong>中文"],
    ["**甲（x）**乙**丙（y）**丁", "<strong>甲（x）</strong>乙<strong>丙（y）</strong>丁"],
    ["a**(b)**c", "a**(b)**c"], ["2 * 3 * 4，好", "2 * 3 * 4，好"],
  ];
  for (const [source, wanted] of rows) assert.equal(outline(drawMarkdown(source)), `<p>${wanted}</p>`, source);
});

test("ranges with a tilde are no struck text, and an address ends at the punctuation of such texts", () => {
  for (const text of ["需要1~2天，3~4天左右", "5~10분, 3~4번", "~2 GB/~4 GB, a ~x~ b"]) assert.equal(outline(drawMarkdown(text)), `<p>${text}</p>`);
  const links = (source: string) => every(drawMarkdown(source)).filter((node) => node.name === "a").map((node) => [node.attributes.href, textOf(node.children)]);
  assert.deepEqual(links("见https://a.example。然后，（https://a.example/b）与“https://a.example/ü?c=d”、 www.a.example！"), [
    ["https://a.example/", "https://a.example"], ["https://a.example/b", "https://a.example/b"], ["https://a.example/%C3%BC?c=d", "https://a.example/ü?c=d"], ["http://www.a.example/", "www.a.example"],
  ]);
  assert.deepEqual(links("https://zh.wikipedia.org/wiki/中文 (https://a.example/(b))."), [
    ["https://zh.wikipedia.org/wiki/%E4%B8%AD%E6%96%87", "https://zh.wikipedia.org/wiki/中文"], ["https://a.example/(b)", "https://a.example/(b)"],
  ]);
});
