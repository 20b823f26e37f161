"""Grammars of Gemma's calls: `Gemma`."""

from __future__ import annotations

import re

from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.grammars.context import Block, Context
from candle_vllm.openai.formats.grammars.literals import Notation, Values
from candle_vllm.openai.formats.grammars.schemas import Branch, Root, Tool
from candle_vllm.openai.formats.grammars.texts import string_body
from candle_vllm.openai.formats.grammars.writer import Writer, quoted, sequence

_WORDS = {None: '"null"', False: '"false"', True: '"true"'}
_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
_BARE = re.compile(r"[A-Za-z_][\w.\-]*")


def gemma(body: Gemma, context: Context) -> Block:
    """A name and an object."""
    context.check_names()
    writer = context.writer
    notation = _notation(writer, body.quote)

    def call(tool: Tool) -> str:
        root = context.root(tool)
        inside = Values(writer, root, notation).items(root.schema, notation.key, notation.free_key)
        return sequence(quoted(tool.name + "{"), inside, '"}"')

    end = writer.mark(body.closers[0]) if body.closers else ""
    return Block(body.prefix, sequence(writer.rule(" | ".join(map(call, context.tools))), end))


def _notation(writer: Writer, quote: str) -> Notation:
    def string(root: Root, branch: Branch) -> str:
        body = string_body(writer, root, branch)
        return sequence(writer.mark(quote), writer.until(quote, body))

    def text(value: str) -> str:
        return sequence(writer.mark(quote), quoted(value) if value else "", writer.mark(quote))

    def free_key(known: list[str]) -> str:
        names = " | ".join(map(quoted, known))
        return sequence(writer.terminal(f"{_KEY} & ~({names})" if known else _KEY), '":"')

    return Notation(
        string=string,
        text=text,
        key=lambda key: sequence(quoted(key) if _BARE.fullmatch(key) else text(key), '":"'),
        free_key=free_key,
        words=_WORDS,
        unkeyable=lambda key: quote in key,
        ordered=True,
    )
