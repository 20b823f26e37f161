# SPDX-License-Identifier: MIT
"""A small vocabulary for grammars, and the JSON-Schema-Test-Suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from tests.registry_packages import CACHE, pypi_file, unpacked

WORDS = (
    '{"',
    '":',
    '", "',
    '": "',
    "true",
    "false",
    "null",
    " hello",
    " world",
    "12",
    "0.",
    "[]",
    "}}",
    "</",
    "think",
    ">{",
)


class SmallVocabulary:
    """Bytes, some words, special tokens behind them, and ids without a token at the end."""

    special = ("<|end|>", "<|stop|>", "<think>", "</think>", "<|call|>")
    vocab_size = 300

    def __init__(self) -> None:
        self.tokens = [bytes([value]) for value in range(256)] + [word.encode() for word in WORDS]
        self.first_special = len(self.tokens)
        self.tokens += [name.encode() for name in self.special]
        self.ends = (self.first_special, self.first_special + 1)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def is_special(self, token_id: int) -> bool:
        return self.first_special <= token_id < len(self.tokens)

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """The longest token that fits, again and again."""
        data, ids = text.encode(), []
        known = self.tokens if parse_special else self.tokens[: self.first_special]
        while data:
            ids.append(max((i for i, t in enumerate(known) if data.startswith(t)), key=lambda i: len(known[i])))
            data = data[len(known[ids[-1]]) :]
        return ids

    def text(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()


@pytest.fixture(scope="session")
def vocabulary() -> SmallVocabulary:
    return SmallVocabulary()


@pytest.fixture(scope="session")
def backend(vocabulary: SmallVocabulary) -> Iterator[LlguidanceBackend]:
    made = LlguidanceBackend(vocabulary, vocabulary.vocab_size, (*vocabulary.ends, 5000))
    yield made
    made.close()


@pytest.fixture(scope="session")
def json_schema_suite() -> Path:
    """The folder with a folder of tests for each draft: part of the sdist of the jsonschema package."""
    sha256 = "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326"
    archive = pypi_file("jsonschema==4.26.0", "jsonschema-4.26.0.tar.gz", sha256, sdist=True)
    folder = CACHE / "jsonschema-4.26.0" / "tests"
    return unpacked(archive, "jsonschema-4.26.0/json/tests/", lambda path: path.endswith(".json"), folder)
