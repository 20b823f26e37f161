# SPDX-License-Identifier: MIT
"""Data sets of `bench`: prompts and the lengths of their answers, in tokens.

A `Words` object counts tokens: by a server's `/tokenize`, a tokenizer on this machine or the engine of this process.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from candle_vllm.core import CandleVllmError
from candle_vllm.server.settings.options import UsageError

_QUESTIONS = ("mt_bench", "spec_bench", "speed_bench")  # files of conversations, whose first turn is the prompt
NAMES = ("random", "sonnet", "sharegpt", "custom", *_QUESTIONS)
_MAX_FILE = 1 << 31  # maximum bytes of a data set
_SETTLING = 8  # maximum attempts to give a random prompt the wanted length
_PREFACE = "Pick as many lines as you can from these poem lines:\n"
_LINES = (
    "The morning leans across the harbour wall", "and counts the boats that never left the bay;",
    "a gull lets go of what it knows of all", "the bread that fell along the market way.",
    "The baker's lamp is older than the street,", "his window keeps the colour of the grain,",
    "and children learn the measure of their feet", "by jumping over mirrors made of rain.",
    "At noon the clocks agree to disagree,", "the ferry waits for nobody it knows,",
    "an orange rolls the whole length of the quay", "and where it stops the smallest shadow grows.",
    "So evening finds us where the evening must:", "with salt upon our sleeves, and flour, and dust.",
)  # fmt: skip


class Words(Protocol):
    """A tokenizer for data sets."""

    def draw(self, count: int, chance: random.Random) -> list[int]:
        """Sample `count` random tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokenize a text, without a beginning-of-sequence token."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Sample:
    """A request of a data set; its prompt's length in tokens has no special tokens.

    `output_len` limits the answer; None if neither the user nor the data set does.
    """

    prompt: str
    prompt_len: int
    output_len: int | None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options by which a command chooses its requests.

    Attributes:
        input_len, output_len: lengths in tokens; None means those of the data set. Files ignore `input_len`.
        random_prefix_len: number of tokens that all random prompts share at the start.
        random_range_ratio: random lengths are between (1 - ratio) and (1 + ratio) times `input_len` and `output_len`.
    """

    dataset_name: str = "random"
    dataset_path: Path | None = None
    num_prompts: int = 1000
    input_len: int | None = None
    output_len: int | None = None
    random_prefix_len: int = 0
    random_range_ratio: float = 0.0
    seed: int = 0


def make_samples(options: DataOptions, words: Callable[[], Words]) -> list[Sample]:
    """Return the requests of a data set.

    UsageError if the name, the path or the file's content is invalid, OSError if the file cannot be read. `words`
    returns the tokenizer; it is called after these checks.
    """
    name, path, count = options.dataset_name, options.dataset_path, options.num_prompts
    chance = random.Random(options.seed)  # noqa: S311 - no secret
    if name == "hf":
        raise UsageError(
            "--dataset-name hf: data sets are not downloaded; mt_bench, spec_bench, speed_bench and custom read one "
            "that you saved as lines of JSON"
        )
    if name not in NAMES:
        raise UsageError(f"--dataset-name must be one of {', '.join(NAMES)}, not {name!r:.60}")
    if (path is None) != (name in ("random", "sonnet")):
        raise UsageError(f"--dataset-path is only for data sets in files; {name} is generated" if path
                         else f"--dataset-name {name} needs --dataset-path FILE")  # fmt: skip
    if path is None:
        make = _random if name == "random" else _sonnet
        return make(words(), options, chance)
    if name == "speed_bench" and path.is_dir():
        path /= "qualitative.jsonl"  # the part that vLLM uses, too
    found = list(_sharegpt(path) if name == "sharegpt" else _lines(path, name))
    if not found:
        raise UsageError(f"{path} has no request for --dataset-name {name}")
    chance.shuffle(found)
    counted = words()
    chosen = [found[index % len(found)] for index in range(count)]
    return [_counted(prompt, answer, options, counted) for prompt, answer in chosen]


def _counted(prompt: str, answer: str | int | None, options: DataOptions, words: Words) -> Sample:
    length = options.output_len
    if length is None and answer is not None:
        length = answer if isinstance(answer, int) else max(1, len(words.encode(answer)))
    return Sample(prompt, len(words.encode(prompt)), length)


def _between(length: int, ratio: float, chance: random.Random) -> int:
    return max(1, chance.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


def _random(words: Words, options: DataOptions, chance: random.Random) -> list[Sample]:
    """Return prompts of random tokens, as texts that have the wanted number of tokens if the vocabulary allows it."""
    prefix = words.draw(options.random_prefix_len, chance)
    made = []
    for _ in range(options.num_prompts):
        length = _between(options.input_len or 1024, options.random_range_ratio, chance)
        output = _between(options.output_len or 128, options.random_range_ratio, chance)
        made.append(Sample(*_random_text(words, prefix, length, chance), output))
    return made


def _random_text(words: Words, prefix: list[int], length: int, chance: random.Random) -> tuple[str, int]:
    wanted = len(prefix) + length
    ids = prefix + words.draw(length, chance)
    text = words.decode(ids)
    for _ in range(_SETTLING):  # random tokens decoded to text are seldom tokenized to the same tokens
        ids = words.encode(text)
        if len(ids) == wanted:
            break
        text = words.decode(ids[:wanted] + words.draw(max(0, wanted - len(ids)), chance))
    return text, len(words.encode(text))


def _sonnet(words: Words, options: DataOptions, chance: random.Random) -> list[Sample]:
    """Return prompts of `_PREFACE` and random lines of a poem, as many as the wanted length allows."""
    wanted = options.input_len or 550
    sizes = [len(words.encode(line + "\n")) for line in _LINES]
    made = []
    for _ in range(options.num_prompts):
        lines, size = [], len(words.encode(_PREFACE))
        while True:
            index = chance.randrange(len(_LINES))
            if size + sizes[index] > wanted:
                break
            lines.append(_LINES[index] + "\n")
            size += sizes[index]
        text = _PREFACE + "".join(lines)
        made.append(Sample(text, len(words.encode(text)), options.output_len or 150))
    return made


def _sharegpt(path: Path) -> Iterator[tuple[str, str]]:
    """Yield question and answer from the first two turns of each conversation that begins with two texts."""
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    for entry in value if isinstance(value, list) else ():
        turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        both = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [text for text in both if isinstance(text, str) and text]
        if len(texts) == 2:
            yield texts[0], texts[1]


def _lines(path: Path, name: str) -> Iterator[tuple[str, int | None]]:
    """Yield the prompt of each line of JSON, and the maximum length of its answer, or None."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{path}, line {number}: it is not JSON") from None
        entry = value if isinstance(value, Mapping) else {}
        if name in _QUESTIONS:
            turns = entry.get("turns", entry.get("messages"))
            first = turns[0] if isinstance(turns, list) and turns else None
            entry = {"prompt": first.get("content") if isinstance(first, Mapping) else first, "output_tokens": 256}
        prompt, tokens = entry.get("prompt"), entry.get("output_tokens")
        if not isinstance(prompt, str) or not prompt:
            wanted = '{"turns": [TEXT]}' if name in _QUESTIONS else '{"prompt": TEXT}'
            raise UsageError(f"{path}, line {number}: {wanted} is wanted")
        yield prompt, tokens if type(tokens) is int and tokens > 0 else None


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE:
        raise UsageError(f"{path} is larger than {_MAX_FILE >> 30} GB")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None


class LocalWords:
    """A tokenizer on this machine: a folder with tokenizer files, or a GGUF file."""

    def __init__(self, path: Path) -> None:
        from candle_vllm.core.text.tokenizer import Tokenizer

        if path.suffix == ".gguf":
            from candle_vllm.core.loading.gguf import GgufFile

            with contextlib.closing(GgufFile(path)) as file:
                self._tokenizer = Tokenizer.from_gguf(file.metadata)
        else:
            self._tokenizer = Tokenizer.from_folder(path)

    def draw(self, count: int, chance: random.Random) -> list[int]:
        return [chance.randrange(self._tokenizer.vocab_size) for _ in range(count)]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


class ServerWords:
    """The server's own `/tokenize` and `/detokenize`; CandleVllmError if a request fails or returns nothing.

    `http` is a client of the server, which the caller closes; `model` is the model whose tokenizer is used.
    """

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http = http
        self._model = model
        ids = self.encode("To be counted.")
        if not ids or not self.decode(ids):
            raise CandleVllmError("the server's /tokenize or /detokenize returns nothing")
        # The server does not report its vocabulary; tokens of plain text represent it.
        self._known = sorted({token for line in (*_LINES, _PREFACE) for token in self.encode(line)})

    def draw(self, count: int, chance: random.Random) -> list[int]:
        return chance.choices(self._known, k=count)

    def encode(self, text: str) -> list[int]:
        return self._ask("/tokenize", "tokens", {"prompt": text, "add_special_tokens": False})

    def decode(self, ids: Sequence[int]) -> str:
        return self._ask("/detokenize", "prompt", {"tokens": list(ids)})

    def _ask(self, path: str, field: str, body: dict[str, Any]) -> Any:
        try:
            answer = self._http.post(path, json={"model": self._model, **body})
            answer.raise_for_status()
            return answer.json()[field]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            why = str(error).partition("\n")[0]
            if isinstance(error, httpx.HTTPStatusError):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # without a message in OpenAI's form
                    why = f"{error.response.json()['error']['message']:.300}"
            raise CandleVllmError(
                f"tokens cannot be counted by the server ({path}: {why}): name a tokenizer of this machine with "
                "--tokenizer FOLDER|FILE.gguf"
            ) from None
