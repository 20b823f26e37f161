// SPDX-License-Identifier: MIT
// Colours for code: highlight.js' grammars, whose result is taken as a tree and never as HTML. Loaded when first needed.

import highlighter from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import ini from "highlight.js/lib/languages/ini";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import markdown from "highlight.js/lib/languages/markdown";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";

export type Coloured = string | { scope: string; children: Coloured[] };

const LANGUAGES = {
  bash, cpp, css, diff, go, ini, java, javascript, json, markdown, python, rust, sql, typescript, xml, yaml,
};

interface Emitted {
  scope?: string;
  children: (string | Emitted)[];
}

const core = highlighter.newInstance();
for (const [name, language] of Object.entries(LANGUAGES)) core.registerLanguage(name, language);
core.registerAliases(["c", "h", "hpp", "c++"], { languageName: "cpp" });
core.registerAliases(["shell", "console", "zsh"], { languageName: "bash" });
core.registerAliases(["jsonc", "json5"], { languageName: "json" });

/** The parts of a code with their kinds; undefined for a language that is not known. */
export function colour(code: string, language: string): Coloured[] | undefined {
  const name = language.toLowerCase();
  if (!core.getLanguage(name)) return undefined;
  const result = core.highlight(code, { language: name, ignoreIllegals: true });
  const root = (result._emitter as unknown as { rootNode: Emitted }).rootNode;
  return root.children.map(read);
}

function read(node: string | Emitted): Coloured {
  if (typeof node === "string") return node;
  const scope = `hl-${(node.scope ?? "").split(/[.:]/)[0]!.replaceAll("_", "-")}`;
  return { scope, children: node.children.map(read) };
}
