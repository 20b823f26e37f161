# SPDX-License-Identifier: MIT
"""A user's Lark grammar within a JSON string takes the spellings of just those texts that it takes by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from llguidance import LLMatcher, LLTokenizer

from candle_vllm.core.errors import RequestError
from candle_vllm.openai.formats.grammars.custom import json_rules, text_terminals
from candle_vllm.openai.formats.grammars.writer import Writer

BYTES = LLTokenizer("byte")
PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""  # as Codex sends it
SUM = """
// numbers and brackets
start: expr
?expr: term (("+" | "-") term)*
term: factor (/[*\\/]/ factor)*
factor: NUMBER | "(" expr ")" | KW
KW: "select"i | "a".."c"
%import common (NUMBER)
"""


def matcher(lines: list[str]) -> LLMatcher:
    made = LLMatcher(BYTES, json.dumps({"grammars": [{"name": "top", "lark_grammar": "\n".join(lines)}]}), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def takes(made: LLMatcher, text: str) -> bool:
    copy, data = made.deep_copy(), list(text.encode())
    return (
        copy.validate_tokens(data) == len(data) and copy.try_consume_tokens(data) == len(data) and copy.is_accepting()
    )


CASES: list[tuple[str, list[str]]] = [
    (
        PATCH,
        [
            '*** Begin Patch\n*** Add File: a "b"\\c.py\n+print("x\\n")\n+\ty\n*** End Patch',
            "*** Begin Patch\n*** Update File: b\n@@ def\n-a\n+\u00e9\n*** End of File\n*** End Patch\n",
            "*** Begin Patch\n*** End Patch",
            "*** Begin Patch\n*** Delete File: b*** End Patch",
            "hello",
        ],
    ),
    (SUM, ["1+2*(3-4.5)", "(1", "SeLect+b", "d", "1/2", ""]),
    (r'start: /a{2,3}[^\d"]\s?\x41/i', ["aa\na", "AAx A", "aaa\\A", 'aa"a', "a"]),
    (r'start: ["x"] /[^a"]*/ | "\"\n" "y"i', ["x", 'x"', "b\\\nc", '"\nY', '"\ny', "a"]),
    ('start: A+\n_B: "b\\t"\nA: "a" _B?', ["a", "ab\t", "ab", "aab\ta"]),
    ("start: /(.|\\n){1,3}/", ["a", "\n", '"\\\n', "abcd"]),
    ("start: /a.b/s", ["a\nb", "axb", "ab"]),
    (r'start: ("+".."/" | "\t".."\n")+', ["+/", "\t\n", "+,-.", "0"]),
    ('start: "\\u2000".."\\u200a"', ["\u2000", "\u200a", "\u2001", "\u200b", "2", "f"]),
    (r'start: "\\x41"', [r"\x41", "A", r"\u0041"]),
]


@pytest.mark.parametrize(("definition", "texts"), CASES)
def test_spelled_texts_are_taken_as_the_texts_are(definition: str, texts: list[str]) -> None:
    plain = matcher([definition])
    name, lines = json_rules(definition, "u1")
    spelled = matcher([f'start: "\\"" {name} "\\""', *lines])
    found = [takes(plain, text) for text in texts]
    assert [takes(spelled, json.dumps(text, ensure_ascii=False)) for text in texts] == found
    assert set(found) == {True, False}


@pytest.mark.parametrize(("definition", "texts"), [case for case in CASES if case[0] != SUM])
def test_texts_before_a_mark_are_taken_as_they_are(definition: str, texts: list[str]) -> None:
    plain = matcher([definition])
    writer = Writer({})
    held = matcher([writer.lark(writer.until("</p>", writer.custom(definition)))])
    assert [takes(held, f"{text}</p>") for text in texts] == [takes(plain, text) for text in texts]


@pytest.mark.parametrize("definition", [SUM, 'start: "(" start ")" | "a"'])
def test_a_recursive_grammar_is_no_terminal(definition: str) -> None:
    with pytest.raises(RequestError, match="cannot be guaranteed within a call: it is recursive"):
        text_terminals(definition, "u1")


@pytest.mark.parametrize(
    ("definition", "why"),
    [
        ('start: "a"\n%ignore " "', "'%ignore"),
        ('start: %json {"type": "object"}', "'%json"),
        ("start: <|end|>", "'<|end"),
        ('start: A & B\nA: "a"\nB: "b"', "'& B"),
        ("start: /(?=a)a/", "begins with"),
        ("start: /[a[b]]/", "a set within a set"),
        (r"start: /[\\[]/", "a set within a set"),
        ("start: /^a$/", "whole texts"),
        ("start: /a/x", "the flags 'x'"),
        ('start: "ab".."c"', "one character to another"),
        ('start: "a"..xyz', "one character to another"),
        ("%import python.NAME\nstart: NAME", "only common"),
        ("%import common.CPP_COMMENT\nstart: CPP_COMMENT", "has no 'CPP_COMMENT'"),
        ('start: "(" start ")" | /[^"]+/', "it is recursive"),
        ("start: " + '"a" ' * 20_000, "more than 65536 characters"),
    ],
)
def test_what_cannot_be_said_of_a_spelled_text_is_refused(definition: str, why: str) -> None:
    with pytest.raises(RequestError, match="cannot be guaranteed within a call: ") as caught:
        json_rules(definition, "u1")
    assert why in str(caught.value)


@pytest.mark.parametrize("of", [json_rules, text_terminals])
@pytest.mark.parametrize(
    "definition",
    [
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4_500)) + '\nr4500: "a"',
        "start: /" + "[" * 64_000 + "/",
        "start: /" + "[\\a" * 21_000 + "/",
        'start: "' + '\\"' * 32_000,
        "start: /" + "\\/" * 32_000,
        "start: " + "a" * 64_000,
    ],
    ids=["rules in a chain", "open sets", "open sets with escapes", "a string", "an expression", "a word"],
)
def test_64_kb_are_read_in_time(of: Callable[[str, str], object], definition: str) -> None:
    start, said = time.process_time(), ""
    try:
        of(definition, "x")
    except RequestError as error:
        said = str(error)
    assert time.process_time() - start < 2
    assert len(said) < 500
