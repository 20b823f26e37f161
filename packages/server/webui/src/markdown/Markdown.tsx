// SPDX-License-Identifier: MIT
// Blocks of Markdown -> nodes. Nodes alone: no text ever becomes HTML.

import type { Token, Tokens } from "marked";
import type { ComponentChildren, VNode } from "preact";
import { memo } from "../ui/memo.ts";
import { useRef } from "preact/hooks";
import { t } from "../i18n/index.ts";
import { type Block, GrowingBlocks, isFenceClosed, isTooMuch, type ListPart, type MathToken } from "./blocks.ts";
import { CodeBlock } from "./CodeBlock.tsx";
import { decodeEntities } from "./entities.ts";
import { safeLink, safePicture } from "./links.ts";
import { Maths } from "./Maths.tsx";

const GROUP = 24; // blocks

/** Markdown that may still be growing; `open` says that it is. */
export function Markdown({ source, open = false }: { source: string; open?: boolean }) {
  const blocks = useRef<GrowingBlocks>(null);
  if (isTooMuch(source)) return <div class="markdown plain" dir="auto">{source}</div>;
  const read = (blocks.current ??= new GrowingBlocks()).update(source, !open);
  const groups: Omit<GroupProps, "open">[] = [];
  for (let at = 0, after = 0; at < read.length; at += GROUP) {
    const blocks = read.slice(at, at + GROUP);
    groups.push({ blocks, after });
    after = blocks.reduce(rankAfter, after);
  }
  return (
    <div class="markdown">
      {groups.map((group, index) => (
        <Group key={index} {...group} open={open && index === groups.length - 1} />
      ))}
    </div>
  );
}

interface GroupProps {
  blocks: readonly Block[];
  after: number; // the rank of the heading before
  open: boolean;
}

// Blocks in groups: a long answer that grows has a few of them to look at, and not every block.
const Group = memo(
  ({ blocks, after, open }: GroupProps) => <div class="blocks">{children(blocks, open, after)}</div>,
  (before, after) =>
    before.open === after.open &&
    before.after === after.after &&
    before.blocks.length === after.blocks.length &&
    before.blocks.every((block, index) => block === after.blocks[index]),
);

/** The rank of the last heading: one that skips ranks, as models write them, stands right below the one before. */
const rankAfter = (rank: number, block: Block): number =>
  block.type === "heading" ? Math.min((block as Tokens.Heading).depth, rank + 1) : rank;

interface BlockProps {
  block: Block;
  rank?: number | undefined; // of a heading; none inside another block
  dir?: "auto" | undefined; // that of the text; none inside another block, which has one
  open: boolean;
}

// A block is the same as long as its text is: the last one alone changes while an answer is written.
const BlockView = memo(
  ({ block, rank, dir, open }: BlockProps) => blockNode(block, open, rank, dir),
  (before, after) =>
    before.open === after.open && before.rank === after.rank && (before.block === after.block || (after.open && before.block.raw === after.block.raw)),
);

export function blockNode(block: Block, open: boolean, rank?: number, dir?: "auto"): VNode | null {
  switch (block.type) {
    case "heading":
      return heading(block as Tokens.Heading, rank, dir);
    case "paragraph":
      return <p dir={dir}>{inline((block as Tokens.Paragraph).tokens)}</p>;
    case "text":
      return <p dir={dir}>{textOf(block as Tokens.Text)}</p>;
    case "code": {
      const { text, lang, raw } = block as Tokens.Code;
      return <CodeBlock text={text} language={lang ?? ""} closed={!open || isFenceClosed(raw)} />;
    }
    case "blockquote":
      return <blockquote dir={dir}>{children((block as Tokens.Blockquote).tokens, open)}</blockquote>;
    case "list":
      return list(block as ListPart, open, dir);
    case "table":
      return table(block as Tokens.Table, dir);
    case "hr":
      return <hr />;
    case "math":
      return <Maths {...(block as MathToken)} />;
    case "space":
    case "def":
      return null;
    default:
      return <p class="verbatim" dir={dir}>{block.raw}</p>;
  }
}

function children(tokens: readonly Block[], open: boolean, after?: number): ComponentChildren {
  let rank = after;
  return tokens.map((token, index) => {
    if (rank !== undefined) rank = rankAfter(rank, token);
    return <BlockView key={index} block={token} rank={token.type === "heading" ? rank : undefined} dir={after === undefined ? undefined : "auto"} open={open && index === tokens.length - 1} />;
  });
}

// Headings of an answer stand below its own; what looks like one in a quotation or a list is none of the page's.
function heading({ depth, tokens }: Tokens.Heading, rank: number | undefined, dir: "auto" | undefined): VNode {
  const Name = rank === undefined ? "p" : ((["h3", "h4", "h5"] as const)[rank - 1] ?? "h6");
  return <Name class={`level-${depth}`} dir={dir}>{inline(tokens)}</Name>;
}

function list({ ordered, start, items, loose, part }: ListPart, open: boolean, dir: "auto" | undefined): VNode {
  const content = items.map((item, index) => (
    <ListItem key={index} item={item} loose={loose} open={open && index === items.length - 1} />
  ));
  const kinds = [items.some((item) => item.task) && "tasks", part && "part"].filter(Boolean).join(" ") || undefined;
  if (!ordered) return <ul class={kinds} dir={dir}>{content}</ul>;
  return <ol class={kinds} dir={dir} start={start === "" ? 1 : start}>{content}</ol>;
}

interface ItemProps {
  item: Tokens.ListItem;
  loose: boolean;
  open: boolean;
}

const ListItem = memo(
  ({ item, loose, open }: ItemProps) => {
    const tokens = item.tokens.filter((token) => token.type !== "checkbox");
    return (
      <li>
        {item.task && <input type="checkbox" checked={item.checked === true} disabled aria-label={t.value.task} />}
        {tokens.map((token, index) => {
          if (token.type === "text" && !loose) return <span key={index}>{textOf(token as Tokens.Text)}</span>;
          return <BlockView key={index} block={token} open={open && index === tokens.length - 1} />;
        })}
      </li>
    );
  },
  (before, after) => before.item.raw === after.item.raw && before.loose === after.loose && before.open === after.open,
);

function table({ header, rows, align }: Tokens.Table, dir: "auto" | undefined): VNode {
  const side = (index: number) => (align[index] ? `align-${align[index]}` : undefined);
  return (
    <div class="table-frame" role="region" aria-label={t.value.table} tabIndex={0}>
      <table dir={dir}>
        <thead>
          <tr>
            {header.map((cell, index) => (
              <th key={index} scope="col" class={side(index)}>
                {inline(cell.tokens)}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row, number) => (
            <tr key={number}>
              {row.map((cell, index) => (
                <td key={index} class={side(index)}>
                  {inline(cell.tokens)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

const textOf = (token: Tokens.Text): ComponentChildren =>
  token.tokens ? inline(token.tokens) : decodeEntities(token.text);

function inline(tokens: readonly Token[] | undefined): ComponentChildren {
  return tokens?.map(inlineNode);
}

function inlineNode(token: Token): ComponentChildren {
  switch (token.type) {
    case "strong":
      return <strong>{inline((token as Tokens.Strong).tokens)}</strong>;
    case "em":
      return <em>{inline((token as Tokens.Em).tokens)}</em>;
    case "del":
      return <del>{inline((token as Tokens.Del).tokens)}</del>;
    case "codespan":
      return <code>{(token as Tokens.Codespan).text}</code>;
    case "br":
      return <br />;
    case "link":
      return link(token as Tokens.Link);
    case "image":
      return picture(token as Tokens.Image);
    case "math":
      return <Maths {...(token as MathToken)} />;
    case "escape":
      return (token as Tokens.Escape).text;
    case "text":
      return textOf(token as Tokens.Text);
    default:
      return token.raw;
  }
}

function link({ href, tokens }: Tokens.Link): ComponentChildren {
  const address = safeLink(decodeEntities(href));
  const content = inline(tokens);
  if (!address) return <span class="dead-link">{content}</span>;
  return (
    <a href={address} title={address} target="_blank" rel="noopener noreferrer nofollow">
      {content}
    </a>
  );
}

// A picture from elsewhere would tell its server what is being read: it becomes a link.
function picture({ href, text }: Tokens.Image): ComponentChildren {
  const source = safePicture(href);
  const name = decodeEntities(text);
  if (source) return <img src={source} alt={name} />;
  const address = safeLink(decodeEntities(href));
  const label = `${t.value.image}: ${name || (address ?? "")}`;
  if (!address) return <span class="dead-link">{label}</span>;
  return (
    <a href={address} title={address} target="_blank" rel="noopener noreferrer nofollow">
      {label}
    </a>
  );
}
