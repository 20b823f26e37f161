# SPDX-License-Identifier: MIT
"""Implementation of `InferenceEngine.embed`, `score` and `classify`, for threads and for event loops.

A call may have thousands of texts. All are checked before the first one runs; then only a limited number of them (a
window) is queued at a time, so that one call does not fill the engine's queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from msgspec.structs import replace

from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput, TokenOutput
from candle_vllm.core.engine.requests import AdapterUse, LoraChoice, PoolingRequest, each_adapter_uses
from candle_vllm.core.engine.step.preparation import check_text_length
from candle_vllm.core.engine.step.request_watchers import Apart
from candle_vllm.core.engine.step.stream import Bar, Entry, Window
from candle_vllm.core.engine.step.thread import PreparingEngine, RequestRunner
from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.text.prompts import Prompt, as_prompts, read_prompt
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.inputs import ImageInput

Pair = tuple[str, str]
Params = PoolingParams | Sequence[PoolingParams] | None
TextTask = Literal["embed", "classify"]


@dataclasses.dataclass
class PoolingCalls:
    """One call for vectors, scores or classes of texts or pairs.

    Args:
        engine: checks and prepares requests.
        thread: returns the thread that drives the engine, or the fleet; started on first use.
        tokenizer, info: the model's tokenizer and information.
        look: reads the images of a prompt; see `InferenceEngine.look`.
        lora_request: the adapters of all inputs, or of each input.
        request_id, priority, add_special_tokens, apart: see `PoolingOptions`.
    """

    engine: PreparingEngine
    thread: Callable[[], RequestRunner]
    tokenizer: Tokenizer
    info: ModelInfo
    look: Callable[[Sequence[int], Sequence[object]], tuple[list[int], tuple[ImageInput, ...]]]
    _: dataclasses.KW_ONLY
    lora_request: LoraChoice | Sequence[LoraChoice] = None
    request_id: str | None = None
    priority: int = 0
    add_special_tokens: bool = True
    apart: Apart = asyncio.to_thread

    def __post_init__(self) -> None:
        self._name = self.request_id or uuid.uuid4().hex

    # ---- vectors and classes -----------------------------------------------------------------------------------------

    def texts(self, task: TextTask, inputs: Prompt | Sequence[Prompt], params: Params, *, use_tqdm: Bar) -> list[Any]:
        """Return a vector of each text, or its classes; see `InferenceEngine.embed` and `classify`."""
        entries = self._texts(inputs, params, task)
        return _outputs(task, entries, self._window(entries).run(use_tqdm=use_tqdm))

    async def atexts(
        self, task: TextTask, inputs: Prompt | Sequence[Prompt], params: PoolingParams | None
    ) -> list[Any]:
        """`texts` in an event loop. Tokenizing runs in a thread, because many texts would block the event loop."""
        entries = await self.apart(self._texts, inputs, params, task)
        return _outputs(task, entries, await self._window(entries).arun())

    # ---- scores ------------------------------------------------------------------------------------------------------

    def score(self, pairs: Sequence[Pair], *, use_tqdm: Bar) -> list[ScoreOutput]:
        if self._is_cross_encoder:
            entries = self._pairs(pairs)
            return _scores(entries, self._window(entries).run(use_tqdm=use_tqdm))
        entries = self._distinct(pairs)
        return _products(pairs, _outputs("embed", entries, self._window(entries).run(use_tqdm=use_tqdm)), self._longest)

    async def ascore(self, pairs: Sequence[Pair]) -> list[ScoreOutput]:
        if self._is_cross_encoder:
            entries = await self.apart(self._pairs, pairs)
            return _scores(entries, await self._window(entries).arun())
        entries = await self.apart(self._distinct, pairs)
        pieces = await self._window(entries).arun()
        return await self.apart(
            lambda: _products(pairs, _outputs("embed", entries, pieces), self._longest, with_ids=False)
        )

    def _window(self, entries: Sequence[Entry]) -> Window:
        return Window(self.thread(), entries, self.engine.max_step_tokens)

    # ---- requests ----------------------------------------------------------------------------------------------------

    @property
    def _is_cross_encoder(self) -> bool:
        return "embed" not in self.info.tasks and "score" in self.info.tasks

    @property
    def _longest(self) -> float:
        """Largest possible dot product: 1 for dense vectors, which are normalised; no limit for sparse ones."""
        return math.inf if self.info.pooling == "sparse" else 1.0

    def _texts(self, inputs: Prompt | Sequence[Prompt], params: Params, task: TextTask) -> list[Entry]:
        prompts = as_prompts(inputs)
        each = _each_params(params, len(prompts))
        uses = each_adapter_uses(self.lora_request, len(prompts))
        entries = []
        for number, (prompt, one, own) in enumerate(zip(prompts, each, uses, strict=True)):
            one = _of_task(one, task)
            with _blaming(number, len(prompts)):
                text, ids, pictures = read_prompt(prompt, sees=True)
                ids, images = self._encode(text or "", self.add_special_tokens) if ids is None else ids, ()
                if pictures:
                    ids, images = self.look(ids, pictures)
                name = _numbered(self._name, number, len(prompts))
                more: dict[str, Any] = {"prompt": text, "pooling": one, "task": task, "images": images}
                entries.append(self._entry(name, ids, own, **more))
        return entries

    def _distinct(self, pairs: Sequence[Pair]) -> list[Entry]:
        """Make a checked request for each distinct text of the pairs, for a normalised vector (or a sparse one)."""
        _check_pairs(pairs)
        uses = each_adapter_uses(self.lora_request, 1)[0]
        entries: dict[str, Entry] = {}
        for number, pair in enumerate(pairs):
            for side, text in enumerate(pair):
                if text in entries:
                    continue
                with _blaming(number, len(pairs), side):
                    name, ids = f"{self._name}-{len(entries)}", self._encode(text, add_special_tokens=True)
                    params = PoolingParams(normalize=self._longest == 1)
                    entries[text] = self._entry(name, ids, uses, prompt=text, pooling=params)
        return list(entries.values())

    def _pairs(self, pairs: Sequence[Pair]) -> list[Entry]:
        _check_pairs(pairs)
        uses = each_adapter_uses(self.lora_request, 1)[0]
        entries = []
        for number, pair in enumerate(pairs):
            with _blaming(number, len(pairs)):
                check_text_length(self.info, self.tokenizer, sum(map(len, pair)))
                ids, types = self.tokenizer.encode_pair(*pair)
                name, kinds = _numbered(self._name, number, len(pairs)), types if any(types) else None
                entries.append(self._entry(name, ids, uses, token_type_ids=kinds, task="score"))
        return entries

    def _entry(self, name: str, ids: list[int], adapters: tuple[AdapterUse, ...], **more: Any) -> Entry:
        request = PoolingRequest(
            request_id=name, prompt_token_ids=ids, priority=self.priority, adapters=adapters, **more
        )
        return Entry(request, self.engine.prepare(request))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        check_text_length(self.info, self.tokenizer, len(text) if isinstance(text, str) else 0)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _each_params(params: Any, count: int) -> list[PoolingParams]:
    each = [params] * count if params is None or isinstance(params, PoolingParams) else params
    if not isinstance(each, (list, tuple)) or not all(isinstance(one, (PoolingParams, type(None))) for one in each):
        raise InvalidParameterError("params must be PoolingParams", "params")
    if len(each) != count:
        raise InvalidParameterError(f"{count} inputs need as many params, not {len(each)}", "params")
    return [one or PoolingParams() for one in each]


def _of_task(params: PoolingParams, task: str) -> PoolingParams:
    """Return the parameters for a task; raises InvalidParameterError if one has no effect on classes. For vectors,
    `use_activation`, vLLM's name, sets `normalize` if that is None."""
    if task == "embed":
        return params if params.normalize is not None else replace(params, normalize=params.use_activation)
    for name in ("dimensions", "normalize", "pooling"):
        if getattr(params, name) is not None:
            raise InvalidParameterError(f"{name} has no effect on classes: leave it out", name)
    return params


def _check_pairs(pairs: Any) -> None:
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence):
        raise InvalidParameterError("pairs must be a list of pairs of texts", "pairs")
    for number, pair in enumerate(pairs):
        good = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
        with _blaming(number, len(pairs)):
            if isinstance(pair, str) or not good:
                raise InvalidParameterError("a pair must be two texts that are not empty", "pairs")


def _numbered(request_id: str, number: int, count: int) -> str:
    return request_id if count == 1 else f"{request_id}-{number}"


@contextmanager
def _blaming(number: int, count: int, side: int | None = None) -> Iterator[None]:
    """Add to an error which of several inputs is wrong, or with `side` which text of which pair."""
    try:
        yield
    except RequestError as error:
        if error.param not in ("prompt", "pairs", "token_type_ids") or (count == 1 and side is None):
            raise
        which = "" if side is None else (", first text", ", second text")[side]
        param = f"inputs.{number}" if side is None else f"inputs.{number}.{side}"
        raise type(error)(f"input {number}{which}: {error}", param) from None


_FORMS: Mapping[TextTask, tuple[Any, str, tuple[str, ...]]] = {
    "embed": (EmbeddingOutput, "embedding", ("vectors", "num_cached_tokens")),
    "classify": (ClassificationOutput, "probs", ("vectors",)),
}
"""By task: the outputs' class, its field for the numbers, and the fields that are as in a `TokenOutput`."""


def _outputs(task: TextTask, entries: Sequence[Entry], pieces: Sequence[TokenOutput]) -> list[Any]:
    kind, numbers, same = _FORMS[task]
    made = list[Any]()
    for entry, piece in zip(entries, pieces, strict=True):
        name, ids = entry.request.request_id, tuple(entry.request.prompt_token_ids)
        fields = {numbers: _numbers(piece)} | {each: getattr(piece, each) for each in same}
        made.append(kind(request_id=name, prompt_token_ids=ids, **fields))
    return made


def _scores(entries: Sequence[Entry], pieces: Sequence[TokenOutput]) -> list[ScoreOutput]:
    return [
        ScoreOutput(
            score=_numbers(piece)[0],
            num_tokens=piece.num_prompt_tokens,
            prompt_token_ids=tuple(entry.request.prompt_token_ids),
        )
        for entry, piece in zip(entries, pieces, strict=True)
    ]


def _numbers(piece: TokenOutput) -> array[float]:
    assert piece.pooled is not None
    return piece.pooled


def _products(
    pairs: Sequence[Pair], outputs: Sequence[EmbeddingOutput], longest: float, *, with_ids: bool = True
) -> list[ScoreOutput]:
    """Score each pair by the vectors of its texts; `outputs` has one for each distinct text, in order of appearance."""
    vectors = dict(zip(dict.fromkeys(text for pair in pairs for text in pair), outputs, strict=True))
    counted: set[str] = set()
    made = []
    for pair in pairs:
        new = set(pair) - counted
        counted |= new
        tokens = sum(len(vectors[text].prompt_token_ids) for text in new)
        first, second = (vectors[text] for text in pair)
        ids = tuple(token for text in pair for token in vectors[text].prompt_token_ids) if with_ids else ()
        made.append(
            ScoreOutput(score=_similarity(first, second, longest=longest), num_tokens=tokens, prompt_token_ids=ids)
        )
    return made


def _similarity(first: EmbeddingOutput, second: EmbeddingOutput, *, longest: float) -> float:
    """Return the dot product of two vectors, clipped to `longest`, because rounding may make it slightly larger.

    For multi-vector models, each vector of the first text is multiplied with all vectors of the second, and the largest
    products are added (MaxSim; Khattab and Zaharia, 2020, arXiv:2004.12832).
    """
    a, b = (np.asarray(each.embedding, np.float64) for each in (first, second))
    if not first.vectors or not second.vectors:
        return max(-longest, min(longest, float(np.dot(a, b)))) if first.vectors is None else 0.0
    a, b = a.reshape(first.vectors, -1), b.reshape(second.vectors, -1)
    return sum(float((a[row : row + 64] @ b.T).max(1).sum()) for row in range(0, len(a), 64))
