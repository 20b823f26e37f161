# SPDX-License-Identifier: MIT
"""Beam search of width w for the likeliest continuations of a prompt, as vLLM's `beam_search`.

Each step extends each beam by the model's 2w likeliest tokens. A sequence with an end token is complete; of the others,
the w best are the next beams. The result is ranked by score: the sum of log-probabilities divided by a power of the
number of tokens, over complete sequences and the beams of the last step (Wu et al., arXiv:1609.08144, section 7, with
the length penalty of transformers instead of the paper's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import FinishReason, PositionLogprobs
from candle_vllm.core.engine.requests import LoraChoice, adapter_uses, each_lora_choice, each_priority
from candle_vllm.core.engine.step.stream import Bar, shown_bar
from candle_vllm.core.engine_front import EngineFront
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.params import MAX_BEAMS, MAX_TOKENS, SamplingParams
from candle_vllm.core.text.prompts import Prompt, as_prompts, read_prompt
from candle_vllm.core.vllm.outputs import Logprob, by_token


class BeamSearchParams(ExplainedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a beam search.

    Attributes:
        beam_width: w, number of beams per prompt, 1 to 10.
        max_tokens: maximum number of generated tokens.
        ignore_eos: whether end tokens do not complete a sequence.
        length_penalty: exponent, -10 to 10: the sum of log-probabilities is divided by the number of tokens to this
            power. Above 0, long sequences are favoured; at 0, only the sum counts.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in self.__struct_fields__}
        for name, most in (("beam_width", MAX_BEAMS), ("max_tokens", MAX_TOKENS)):
            value = given[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InvalidParameterError(f"{name} must be a whole number from 1 to {most}", name)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(given[name], bool):
                raise InvalidParameterError(f"{name} must be true or false", name)
        power = given["length_penalty"]
        if isinstance(power, bool) or not isinstance(power, (int, float)) or not -10 <= power <= 10:
            raise InvalidParameterError("length_penalty must be a number from -10 to 10", "length_penalty")


@dataclasses.dataclass
class BeamSearchSequence:
    """One continuation of a prompt.

    Attributes:
        orig_prompt: the prompt as given.
        tokens: tokens of the prompt and of the continuation, the end token included.
        logprobs: the model's log-probabilities for each token of the continuation, by token id.
        cum_logprob: sum of log-probabilities over the continuation.
        text: text of prompt and continuation.
        finish_reason: "stop" after an end token, otherwise "length".
        stop_reason: always None: beam search has no stop strings.
    """

    orig_prompt: Prompt
    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def score(self, length_penalty: float) -> float:
        """Return the score by which sequences are ranked; higher is better."""
        return _score(self.cum_logprob, len(self.logprobs), length_penalty)


@dataclasses.dataclass
class BeamSearchOutput:
    """The best sequences of a prompt, at most `beam_width`, the best one first."""

    sequences: list[BeamSearchSequence]


@dataclasses.dataclass
class Beam:
    """Tokens that continue a prompt, the end token included; in `logprobs` each token is `chosen`."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    cum_logprob: float = 0.0
    finish_reason: FinishReason = FinishReason.LENGTH


class BeamSearch:
    """The search for the best continuations of one prompt; it has ended when `beams` is empty.

    Raises InvalidParameterError if the model has an `answer_window`, and each step sends a beam's tokens as a prompt.
    """

    def __init__(self, info: ModelInfo, params: BeamSearchParams, prompt_tokens: int) -> None:
        if info.answer_window is not None:
            said = f"use_beam_search: {info.name} reads its answer through a window, which a beam search does not have"
            raise InvalidParameterError(said, "use_beam_search")
        self.beams = [Beam()]
        self._complete: list[Beam] = []
        self._params = params
        self._ends = frozenset(() if params.ignore_eos else info.eos_token_ids)
        self._room = max(1, min(params.max_tokens, info.max_model_len - prompt_tokens))  # tokens that may be generated

    def take(self, entries: Sequence[PositionLogprobs]) -> None:
        """Extend every beam by its likeliest next tokens; `entries` has one position per beam."""
        going: list[Beam] = []
        for beam, entry in zip(self.beams, entries, strict=True):
            for token in entry.top[: 2 * self._params.beam_width]:
                longer = Beam(
                    (*beam.tokens, token.token_id),
                    (*beam.logprobs, PositionLogprobs(token, entry.top)),
                    beam.cum_logprob + token.logprob,
                )
                if token.token_id in self._ends:
                    longer.finish_reason = FinishReason.STOP
                    self._complete.append(longer)
                else:
                    going.append(longer)
        self.beams = self._best(going)
        self._room -= 1
        if not self._room:
            self._complete += self.beams
            self.beams = []

    def best(self) -> list[Beam]:
        """Return the complete beams with the highest scores, at most `beam_width`, the best one first."""
        return self._best(self._complete)

    def _best(self, beams: list[Beam]) -> list[Beam]:
        power = self._params.length_penalty
        ranked = sorted(beams, key=lambda each: _score(each.cum_logprob, len(each.tokens), power), reverse=True)
        return ranked[: self._params.beam_width]


def _score(cum_logprob: float, tokens: int, length_penalty: float) -> float:
    return cum_logprob / max(tokens, 1) ** length_penalty


def beam_search(
    engine: EngineFront,
    prompts: Prompt | Sequence[Prompt],
    params: BeamSearchParams,
    *,
    use_tqdm: Bar = False,
    concurrency_limit: int | None = None,
    priority: int | Sequence[int] = 0,
    lora_request: LoraChoice | Sequence[LoraChoice] = None,
) -> list[BeamSearchOutput]:
    """Search the best continuations of every prompt; outputs are in the order of the prompts.

    Each step of the search sends one request per beam; the prefix cache holds the beam's earlier tokens.

    Arguments and errors are as in `EngineFront.generate`, but `load_inplace` of an adapter is refused, the progress bar
    shows steps, and `concurrency_limit` is the maximum number of prompts that are searched at the same time.
    """
    if not isinstance(params, BeamSearchParams):
        raise InvalidParameterError(f"params must be BeamSearchParams, not {type(params).__name__}", "params")
    given = as_prompts(prompts)
    orders = each_priority(priority, len(given))
    choices = each_lora_choice(lora_request, len(given))
    if any(use.load_inplace for each in choices for use in adapter_uses(each)):
        raise InvalidParameterError(
            "beam_search does not support load_inplace: reload the adapter with add_lora", "lora_request"
        )
    if concurrency_limit is not None and (type(concurrency_limit) is not int or concurrency_limit < 1):
        raise InvalidParameterError("concurrency_limit must be a whole number of at least 1", "concurrency_limit")
    info, inputs = engine.model_info, [_read(engine, prompt) for prompt in given]
    searches = [BeamSearch(info, params, len(each["prompt_token_ids"])) for each in inputs]
    own = list(zip(searches, inputs, orders, choices, strict=True))
    at_a_time = concurrency_limit or len(own) or 1
    for first in range(0, len(own), at_a_time):
        with shown_bar("tokens", params.max_tokens, use_tqdm) as advance:
            while _step(engine, own[first : first + at_a_time], params):
                advance()
    skip = params.skip_special_tokens

    def sequence(prompt: Prompt, tokens: list[int], beam: Beam) -> BeamSearchSequence:
        entries = [by_token(entry) for entry in beam.logprobs]
        text = engine.detokenize(tokens, skip_special_tokens=skip)
        return BeamSearchSequence(prompt, tokens, entries, beam.cum_logprob, text, str(beam.finish_reason))

    return [
        BeamSearchOutput([sequence(prompt, [*each["prompt_token_ids"], *beam.tokens], beam) for beam in search.best()])
        for prompt, (search, each, *_) in zip(given, own, strict=True)
    ]


def beam_step(beam_width: int, logprobs: int = 0, cache_salt: str | None = None) -> SamplingParams:
    """Return the sampling parameters of one beam in one step of a search; `logprobs` is the number for the caller."""
    asked = max(2 * beam_width, logprobs)
    return SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=asked, cache_salt=cache_salt)


def _read(engine: EngineFront, prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as token ids, with its preprocessed images."""
    text, ids, images = read_prompt(prompt, sees="image" in engine.model_info.modalities)
    ids = engine.tokenize(text or "") if ids is None else ids
    if not images:
        return {"prompt_token_ids": ids}
    ids, seen = engine.look(ids, images)
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": seen}}


def _step(
    engine: EngineFront,
    own: Sequence[tuple[BeamSearch, dict[str, Any], int, LoraChoice]],
    params: BeamSearchParams,
) -> bool:
    """Extend every beam by one token, with its search's priority and adapters; return False if there was no beam."""
    todo = [
        ({**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *beam.tokens]}, order, choice)
        for search, prompt, order, choice in own
        for beam in search.beams
    ]
    if not todo:
        return False
    outputs = iter(
        engine.generate(
            [prompt for prompt, _, _ in todo],
            beam_step(params.beam_width),
            use_tqdm=False,
            priority=[order for _, order, _ in todo],
            lora_request=[choice for _, _, choice in todo],
        )
    )
    for search, *_ in own:
        said = [next(outputs).outputs[0].logprobs for _ in search.beams]
        search.take([entry[0] for entry in said if entry])
    return True
