# SPDX-License-Identifier: MIT
"""Beam search of width w for the likeliest continuations of a prompt, as vLLM's `beam_search`.

Each step extends each beam by the model's 2w likeliest tokens. A sequence with an end token is complete; of the others,
the w best are the next beams. The result is ranked by score: the sum of log-probabilities divided by a power of the
number of tokens, over complete sequences and the beams of the last step (Wu et al., arXiv:1609.08144, section 7, with
the length penalty of transformers instead of the paper's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.engine.requests import LoraChoice, adapter_uses, each_lora_choice
from candle_vllm.core.engine.step.stream import Bar, shown_bar
from candle_vllm.core.engine_front import EngineFront
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.params import MAX_LOGPROBS, MAX_TOKENS, SamplingParams
from candle_vllm.core.text.prompts import Prompt, as_prompts, read_prompt
from candle_vllm.core.vllm.outputs import Logprob, by_token

MAX_BEAMS = MAX_LOGPROBS // 2  # vLLM's limit with its default max_logprobs


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
        return self.cum_logprob / max(len(self.logprobs), 1) ** length_penalty


@dataclasses.dataclass
class BeamSearchOutput:
    """The best sequences of a prompt, at most `beam_width`, the best one first."""

    sequences: list[BeamSearchSequence]


class _Search:
    """The beams of one prompt."""

    def __init__(self, first: BeamSearchSequence, params: BeamSearchParams, ends: frozenset[int], room: int) -> None:
        self.beams = [first]
        self.complete: list[BeamSearchSequence] = []
        self._params = params
        self._ends = ends
        self._room = room  # maximum number of tokens that may still be generated

    def take(self, entries: Sequence[dict[int, Logprob]]) -> None:
        """Extend every beam by the model's likeliest tokens."""
        going: list[BeamSearchSequence] = []
        for beam, entry in zip(self.beams, entries, strict=True):
            for token, said in entry.items():
                longer = dataclasses.replace(
                    beam,
                    tokens=[*beam.tokens, token],
                    logprobs=[*beam.logprobs, entry],
                    cum_logprob=beam.cum_logprob + said.logprob,
                )
                if token in self._ends:
                    longer.finish_reason = "stop"
                    self.complete.append(longer)
                else:
                    going.append(longer)
        self.beams = self._best(going)
        self._room -= 1
        if not self._room:
            self.complete += self.beams
            self.beams = []

    def result(self, text: Callable[[list[int]], str]) -> BeamSearchOutput:
        """Return the best sequences."""
        best = self._best(self.complete)
        for each in best:
            each.text = text(each.tokens)
            each.finish_reason = each.finish_reason or "length"
        return BeamSearchOutput(best)

    def _best(self, sequences: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        ranked = sorted(sequences, key=lambda each: each.score(self._params.length_penalty), reverse=True)
        return ranked[: self._params.beam_width]


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

    Args:
        engine: engine that continues the beams.
        prompts: as in `EngineFront.generate`.
        use_tqdm: whether to show a progress bar of steps.
        concurrency_limit: maximum number of prompts that are searched at the same time; None for no limit.
        priority: one priority for all prompts, or one for each.
        lora_request: as in `EngineFront.generate`, but `load_inplace` is refused.

    Raises:
        RequestError: a prompt or an argument is invalid.
        CandleVllmError: as in `EngineFront.generate`.
    """
    if not isinstance(params, BeamSearchParams):
        raise InvalidParameterError(f"params must be BeamSearchParams, not {type(params).__name__}", "params")
    given = as_prompts(prompts)
    orders = [priority] * len(given) if isinstance(priority, int) else list(priority)
    if len(orders) != len(given):
        raise InvalidParameterError(f"{len(given)} prompts need as many priorities, not {len(orders)}", "priority")
    choices = each_lora_choice(lora_request, len(given))
    if any(use.load_inplace for each in choices for use in adapter_uses(each)):
        raise InvalidParameterError(
            "beam_search does not support load_inplace: reload the adapter with add_lora", "lora_request"
        )
    if concurrency_limit is not None and concurrency_limit < 1:
        raise InvalidParameterError("concurrency_limit must be at least 1", "concurrency_limit")
    searches = [_search(engine, prompt, params) for prompt in given]
    own = list(zip(orders, choices, strict=True))
    at_a_time = concurrency_limit or len(searches) or 1
    for first in range(0, len(searches), at_a_time):
        with shown_bar("tokens", params.max_tokens, use_tqdm) as advance:
            last = first + at_a_time
            while _step(engine, searches[first:last], own[first:last], params):
                advance()
    skip = params.skip_special_tokens
    return [each.result(lambda tokens: engine.detokenize(tokens, skip_special_tokens=skip)) for each in searches]


def _search(engine: EngineFront, prompt: Prompt, params: BeamSearchParams) -> _Search:
    text, ids = read_prompt(prompt)
    tokens = engine.tokenize(text or "") if ids is None else ids
    info = engine.model_info
    ends = frozenset() if params.ignore_eos else frozenset(info.eos_token_ids)
    room = max(1, min(params.max_tokens, info.max_model_len - len(tokens)))  # the engine refuses a longer prompt
    return _Search(BeamSearchSequence(prompt, tokens, []), params, ends, room)


def _step(
    engine: EngineFront,
    searches: Sequence[_Search],
    own: Sequence[tuple[int, LoraChoice]],
    params: BeamSearchParams,
) -> bool:
    """Extend every beam by one token, with its search's priority and adapters; return False if no beam is left."""
    todo = [(beam, *each) for search, each in zip(searches, own, strict=True) for beam in search.beams]
    if not todo:
        return False
    asked = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=2 * params.beam_width)
    outputs = iter(
        engine.generate(
            [beam.tokens for beam, _, _ in todo],
            asked,
            use_tqdm=False,
            priority=[order for _, order, _ in todo],
            lora_request=[choice for _, _, choice in todo],
        )
    )
    for search in searches:
        said = [next(outputs).outputs[0].logprobs for _ in search.beams]
        search.take([by_token(entry[0]) for entry in said if entry])
    return True
