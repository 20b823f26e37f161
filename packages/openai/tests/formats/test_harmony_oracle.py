# SPDX-License-Identifier: MIT
"""Harmony as OpenAI's own parser reads it: what the two make of one row of tokens is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai_harmony as harmony
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.openai.formats.layout import Layout, SpecialText, bind
from candle_vllm.openai.formats.parser import OutputParser
from packages.openai.tests.formats.messages import REASONING, TOOLS, Parsed, parse

ENCODING = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
NAMES = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
SPECIAL = {name: ENCODING.encode(name, allowed_special={name})[0] for name in (*NAMES, "<|endoftext|>")}
LAYOUT = Layout(REASONING["openai"], TOOLS["openai"])
BOUND = bind(LAYOUT, SPECIAL)
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
SCHEMAS = {"get_weather": SCHEMA, "f2": SCHEMA, "now": {"type": "object", "properties": {}}}
ARGS = '{"city": "New \\"York\\" \\u00e9 }{", "tags": [["a"], {"b": null}], "days": -3.5e2}'
NEXT = "<|start|>assistant"
CALL = "<|channel|>commentary to=functions.f2 <|constrain|>json<|message|>"


def tokens_of(text: str) -> list[int]:
    """The tokens of a text in which every special token's name is that token."""
    return ENCODING.encode(text, allowed_special="all")


def their_parts(tokens: Sequence[int], *, ended: bool = True) -> list[tuple[str, str, str]]:
    """The parts that OpenAI's parser finds behind `<|start|>assistant`: (channel, recipient, text)."""
    reader = harmony.StreamableParser(ENCODING, harmony.Role.ASSISTANT)
    for token in tokens:
        reader.process(token)
    if ended:
        reader.process_eos()
    parts = [(one.channel or "", one.recipient or "", one.to_dict()["content"][0]["text"]) for one in reader.messages]
    if not ended and reader.state is harmony.StreamState.CONTENT:
        parts.append((reader.current_channel or "", reader.current_recipient or "", reader.current_content))
    return parts


def theirs(tokens: Sequence[int], *, ended: bool = True) -> tuple[str, str, list[tuple[str, str]]]:
    """Words of the content, reasoning and calls of those parts; white space around a part is left out."""
    parts = their_parts(tokens, ended=ended)
    content = flat(" ".join(text for channel, to, text in parts if not to and channel != "analysis"))
    thoughts = "".join(text.strip() for channel, to, text in parts if not to and channel == "analysis")
    return content, thoughts, [(to.removeprefix("functions."), text.strip()) for _, to, text in parts if to]


def flat(text: str) -> str:
    return " ".join(text.split())


def pieces(tokens: Sequence[int]) -> Iterator[str]:
    """The text of each token as the engine gives it, special tokens bound; never half a character."""
    special, offset = SpecialText(BOUND), 0
    held: list[int] = []
    names = {token: name for name, token in SPECIAL.items()}
    for token in tokens:
        held.append(token)
        text = ENCODING.decode(held, errors="replace")
        if text.endswith("\ufffd"):
            continue
        yield special.add(text, [(offset, token)] if token in names else [])
        offset += len(text)
        held.clear()
    yield special.finish()


def parser(*, bound: bool) -> OutputParser:
    return OutputParser(BOUND.layout if bound else LAYOUT, tools=SCHEMAS, make_id=str)


def ours(tokens: Sequence[int], *, whole: bool = True, plain: bool = True) -> Parsed:
    """What our parser finds, whichever way the text comes to it; marks are special tokens, or `plain` text too."""
    parsed = parse(parser(bound=True), pieces(tokens), whole)
    assert parse(parser(bound=True), ["".join(pieces(tokens))], whole) == parsed
    if plain:
        text = ENCODING.decode(tokens)
        assert parse(parser(bound=False), [text], whole) == parsed
        assert parse(parser(bound=False), map(ENCODING.decode, [[one] for one in tokens]), whole) == parsed
    return parsed


def stripped(parsed: Parsed) -> tuple[str, str, list[tuple[str, str]]]:
    return flat(parsed.content), parsed.thoughts.strip(), [(name, text) for _, name, text, _ in parsed.calls]


def call(header: str, arguments: str = ARGS, end: str = "<|call|>") -> str:
    return f"{header}<|message|>{arguments}{end}"


ANALYSIS = "<|channel|>analysis<|message|>The user asks: 2 < 3 & `to=f`?<|end|>"
CONVERSATIONS = {
    "final": "<|channel|>final<|message|>Hello, 2 < 3!<|return|>",
    "final, no end": "<|channel|>final<|message|>Hello <|b|> <|",
    "analysis, final": f"{ANALYSIS}{NEXT}<|channel|>final<|message|># Yes\n\n```json\n{{}}\n```<|return|>",
    "only analysis": ANALYSIS,
    "analysis, no end": "<|channel|>analysis<|message|>Hm",
    "several analyses": f"{ANALYSIS}{NEXT}{ANALYSIS}{NEXT}<|channel|>final<|message|>Yes<|return|>",
    "preamble": f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}{CALL}{ARGS}<|call|>",
    "analysis, preamble, call": f"{ANALYSIS}{NEXT}<|channel|>commentary<|message|>I look.<|end|>{NEXT}{CALL}{ARGS}",
    "call": f"{CALL}{ARGS}<|call|>",
    "recipient in channel": call("<|channel|>commentary to=functions.get_weather"),
    "recipient, content type": call("<|channel|>commentary to=functions.get_weather json"),
    "recipient in role": call(" to=functions.get_weather<|channel|>commentary json"),
    "recipient in role, constrained": call(" to=functions.f2<|channel|>commentary <|constrain|>json"),
    "no space before the constraint": call(" to=functions.f2<|channel|>commentary<|constrain|>json"),
    "no space behind the recipient": call("<|channel|>commentary to=functions.f2<|constrain|>json"),
    "call in analysis": call(" to=functions.f2<|channel|>analysis code"),
    "recipient in channel of analysis": call("<|channel|>analysis to=functions.f2 code"),
    "no name space": call("<|channel|>commentary to=f2"),
    "a tool of the model's own": call("<|channel|>analysis to=browser.search code", '{"query": "x"}'),
    "call, no end": call(" to=functions.f2<|channel|>commentary", end=""),
    "call, end of a message": call(" to=functions.f2<|channel|>commentary", end="<|end|>"),
    "white space around arguments": call(CALL.removesuffix("<|message|>"), f"\n {ARGS}\n"),
    "no arguments": call(" to=functions.now<|channel|>commentary json", "{}"),
    "two calls": f"{CALL}{ARGS}<|call|>{NEXT} to=functions.now<|channel|>commentary json<|message|>{{}}<|call|>",
    "calls among thoughts": f"{ANALYSIS}{NEXT}{CALL}{{}}<|call|>{NEXT}{ANALYSIS}{NEXT}{CALL}{ARGS}<|call|>",
    "a call, then an answer": f"{CALL}{{}}<|end|>{NEXT}<|channel|>final<|message|>Done.<|return|>",
    "no channel": "<|message|>Hello<|return|>",
    "empty": "<|channel|>final<|message|><|return|>",
    "a channel that nobody knows": "<|channel|>notes<|message|>Hello<|end|>",
    "a channel named twice": "<|channel|>analysis<|channel|>final<|message|>Hm<|end|>",
}
by_name = pytest.mark.parametrize("text", CONVERSATIONS.values(), ids=CONVERSATIONS)


@by_name
def test_a_conversation_is_read_as_openai_reads_it(text: str) -> None:
    tokens = tokens_of(text)
    parsed = ours(tokens)
    assert stripped(parsed) == theirs(tokens)
    assert all(closed and json.loads(arguments) is not None for _, _, arguments, closed in parsed.calls)


@by_name
def test_so_is_each_beginning_of_it(text: str) -> None:
    """Nothing but the beginning of an escape is held back of a text that was cut."""
    tokens = tokens_of(text)
    for end in range(len(tokens)):
        content, thoughts, calls = stripped(ours(tokens[:end], whole=False, plain=False))
        their_content, their_thoughts, their_calls = theirs(tokens[:end], ended=False)
        assert (content, thoughts) == (their_content, their_thoughts), end
        begun = [one for one in their_calls if one[1]]  # a call begins with its arguments
        assert [name for name, _ in calls] == [name for name, _ in begun], end
        for (_, arguments), (_, full) in zip(calls, begun):
            assert full.startswith(arguments), end
            assert len(full) - len(arguments) <= 6, end


F2 = [("f2", ARGS)]
HI = "<|channel|>final<|message|>Hi<|return|>"
FAILS = "fails"
# Texts that OpenAI's parser reads otherwise: what it finds, and what we do. Ours is meant: an answer whose marks are
# wrong in a place is still an answer, and special tokens are no text.
DIFFERENCES: dict[str, tuple[str, Any, Any]] = {
    "no header at all": ("Hi", FAILS, ("Hi", "", [])),
    "an end that is missing": (
        f"<|channel|>analysis<|message|>Hm.{NEXT}{HI}",
        ("", f"Hm.{NEXT}{HI.removesuffix('<|return|>')}", []),
        ("Hi", "Hm.", []),
    ),
    "a start that is missing": (f"<|channel|>analysis<|message|>Hm.<|end|>{HI}", FAILS, ("Hi", "Hm.", [])),
    "a start that the prompt had": (NEXT + HI, ("", "", [(NEXT, "Hi")]), ("Hi", "", [])),
    "a channel without a name": ("<|channel|><|message|>Hi<|return|>", FAILS, ("Hi", "", [])),
    "a form for the answer": (
        '<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>',
        ("", "", [("<|constrain|>json", '{"a": 1}')]),
        ('{"a": 1}', "", []),
    ),
    "two recipients": (
        call("<|channel|>commentary to=functions.f2 to=functions.now"),
        FAILS,
        ("", "", F2),
    ),
    "space behind the constraint": (
        call("<|channel|>commentary to=functions.f2 <|constrain|> json"),
        FAILS,
        ("", "", F2),
    ),
    "a recipient who is no function": (
        "<|channel|>final to=user<|message|>Hi<|return|>",
        ("", "", [("user", "Hi")]),
        ("Hi", "", []),
    ),
    "arguments that lack brackets": (
        f'{CALL}{{"a": [1<|call|>',
        ("", "", [("f2", '{"a": [1')]),
        ("", "", [("f2", '{"a": [1]}')]),
    ),
    "no arguments": (f"{CALL}<|call|>", ("", "", [("f2", "")]), ("", "", [("f2", "{}")])),
    "more than the arguments": (f"{CALL}{ARGS} ok?<|call|>", ("", "", [("f2", f"{ARGS} ok?")]), ("", "", F2)),
    "code for a tool of one text": (
        "<|channel|>commentary to=python<|message|>print(1)<|call|>",
        ("", "", [("python", "print(1)")]),
        ("", "", [("python", '{"code": "print(1)"}')]),
    ),
    "a header that does not end": ("<|channel|>commentary to=functions.f2", FAILS, ("", "", [])),
    "a tool's result, made up": (
        f'{ANALYSIS}<|start|>functions.f2 to=assistant<|channel|>commentary<|message|>{{"a": 1}}<|end|>{NEXT}{HI}',
        ("Hi", "The user asks: 2 < 3 & `to=f`?", [("assistant", '{"a": 1}')]),
        ("Hi", "The user asks: 2 < 3 & `to=f`?", []),
    ),
    "a user's turn, made up": (f"{HI}<|start|>user<|message|>And?<|end|>", ("Hi And?", "", []), ("Hi", "", [])),
}


@pytest.mark.parametrize(("text", "their_reading", "our_reading"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_where_the_two_differ(text: str, their_reading: Any, our_reading: Any) -> None:
    tokens = tokens_of(text)
    if their_reading == FAILS:
        with pytest.raises(harmony.HarmonyError):
            theirs(tokens)
    else:
        assert theirs(tokens) == their_reading
    assert stripped(ours(tokens)) == our_reading


def test_special_tokens_in_a_text_are_left_out() -> None:
    tokens = tokens_of("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|endoftext|>d<|return|>")
    assert theirs(tokens)[0] == "a<|message|>b<|constrain|>c<|endoftext|>d"
    assert ours(tokens, plain=False).content == "abcd"


def test_white_space_at_the_end_of_an_answer_is_kept() -> None:
    """Around parts that others follow it separates them."""
    tokens = tokens_of(
        f"<|channel|>analysis<|message|> Hm. \n<|end|>{NEXT}<|channel|>final<|message|>Hi \n\n<|return|>"
    )
    assert [text for _, _, text in their_parts(tokens)] == [" Hm. \n", "Hi \n\n"]
    assert ours(tokens) == Parsed("Hi \n\n", "Hm.", ())


@pytest.mark.parametrize("constrained", ["<|constrain|>json", "json", None])
def test_what_openai_renders(constrained: str | None) -> None:
    assistant, message = harmony.Role.ASSISTANT, harmony.Message.from_role_and_content
    called = message(assistant, ARGS).with_channel("commentary").with_recipient("functions.get_weather")
    parts = [
        message(assistant, "Hm.").with_channel("analysis"),
        message(assistant, "I look.").with_channel("commentary"),
        called.with_content_type(constrained) if constrained else called,
        message(assistant, "So").with_channel("analysis"),
        message(assistant, "It rains.").with_channel("final"),
    ]
    rendered = [token for part in parts for token in ENCODING.render(part)]
    tokens = rendered[len(tokens_of(NEXT)) :]
    parsed = ours(tokens)
    assert stripped(parsed) == theirs(tokens)
    assert parsed == Parsed("I look.\nIt rains.", "Hm.So", (("0", "get_weather", ARGS, True),))


HEADERS = (
    "<|channel|>commentary to=functions.{}",
    "<|channel|>commentary to=functions.{} <|constrain|>json",
    "<|channel|>commentary to=functions.{}<|constrain|>json",
    " to=functions.{}<|channel|>commentary json",
    " to=functions.{}<|channel|>commentary <|constrain|>json",
    " to=functions.{}<|channel|>analysis code",
)
FRAGMENTS = [
    "a",
    "The ",
    "to=f",
    " ",
    "\n",
    "é",
    "🙂",
    '"',
    "{",
    "}",
    "assistant",
    "final",
    "<",
    "|>",
    "`",
    "\\",
    "json",
]
MARKS = ["<|end|>", "<|call|>", "<|channel|>final<|message|>", "<|start|>assistant", "<|constrain|>"]
words = st.lists(st.sampled_from([*FRAGMENTS, *MARKS]), max_size=8).map(lambda parts: "".join(parts).strip())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
arguments = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    st.dictionaries(words, values, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
)
calls = st.tuples(st.builds(str.format, st.sampled_from(HEADERS), st.sampled_from(sorted(SCHEMAS))), arguments)
texts = st.tuples(st.sampled_from([f"<|channel|>{name}" for name in ("analysis", "commentary", "final")]), words)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(calls | texts, min_size=1, max_size=5), st.data())
def test_random_conversations(parts: list[tuple[str, str]], data: st.DataObject) -> None:
    """Texts may read like marks: they are none, for they are not those tokens."""
    tokens: list[int] = []
    for number, (header, text) in enumerate(parts):
        ends = ["<|call|>", "<|end|>"] if "to=" in header else ["<|end|>", "<|return|>"]
        end = data.draw(st.sampled_from(ends if number < len(parts) - 1 else [*ends, ""]))
        tokens += tokens_of((NEXT if number else "") + header + "<|message|>")
        tokens += ENCODING.encode(text, disallowed_special=()) + tokens_of(end)
    parsed = ours(tokens, plain=not any("<|" in text for _, text in parts))
    assert stripped(parsed) == theirs(tokens)
    assert all(closed for _, _, _, closed in parsed.calls)
