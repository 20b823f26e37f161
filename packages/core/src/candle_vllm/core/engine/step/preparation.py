# SPDX-License-Identifier: MIT
"""Check a request against the model's tasks, vocabulary and context, and make its sequences (before step 4)."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq

import msgspec

from candle_vllm.core.engine.adapters.adapter_store import AdapterStore, Entries
from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.requests import AdapterUse, GenerationRequest, PoolingRequest
from candle_vllm.core.engine.step.live import Live, LiveSequence, Prediction
from candle_vllm.core.engine.step.pooled import PooledText
from candle_vllm.core.engine.step.sequence import NO_LIMIT, PlacedImage, Sequence
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.pooled_head import PooledHead
from candle_vllm.core.pooling import BY_TOKEN, POOLING_METHODS, ModelPooling, PoolingPlan
from candle_vllm.core.sampling.dry import BreakerTable
from candle_vllm.core.sampling.grammar import GrammarState
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.sampling.thoughts import ThoughtCount, ThoughtLimit, budget_in_tokens
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.prompts import VisionInput

MAX_TEXT = 1 << 22
"""Characters that a text may always have if the model generates no text: one unknown token may stand for many."""


class Preparation(ABC):
    """Turns requests to one model into sequences. Thread-safe.

    Attributes:
        max_model_len: longest prompt plus output, in tokens.
        room: tokens of a prompt that a step can run beside all other sequences.
        adapters: the adapters that requests may name; None without LoRA.
    """

    max_model_len: int
    room = NO_LIMIT
    adapters: AdapterStore | None = None

    @abstractmethod
    def prepare(self, request: GenerationRequest) -> Seq[Live]:
        """Check a request and make its sequences; raises InvalidParameterError or PromptTooLongError."""

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """Compile and cache a request's grammar; raises InvalidParameterError if it is not valid or not supported."""
        raise NotImplementedError

    def _entries(self, uses: Seq[AdapterUse]) -> Entries:
        """Find a request's adapters and begin to load them; raises like `AdapterStore.found`, and if LoRA is off."""
        if self.adapters is None:
            raise InvalidParameterError(
                f"adapter {uses[0].name!r:.80}: adapters are off; load the model with enable_lora=True",
                "lora_request",
            )
        entries = self.adapters.found(uses)
        self.adapters.expect(entries)
        return entries

    def close(self) -> None:  # noqa: B027  # most subclasses have no threads
        """End the preparation's threads."""


@dataclasses.dataclass(eq=False)
class EncoderPreparation(Preparation):
    """Turns requests to an encoder into sequences.

    Args:
        name: the model's name, for messages.
        config: the model's config.
        pooling: pools hidden states; None for an encoder that returns scores instead (`EncoderConfig.scores`).
        max_model_len: longest text, in tokens.
        adapters: see `Preparation`.
        head: layers after the pooling; None without such layers.
    """

    name: str
    config: EncoderConfig
    pooling: ModelPooling | None
    max_model_len: int
    adapters: AdapterStore | None = None
    head: PooledHead | None = None

    def prepare(self, request: GenerationRequest) -> list[PooledText]:
        wanted = request.task if isinstance(request, PoolingRequest) else "generate"
        check_encoder_task(self.name, wanted, pooling_tasks(self.config.labels, self.config.head_pooling))
        entries = self._entries(request.adapters) if request.adapters else ()
        assert isinstance(request, PoolingRequest)
        check_pooling_request(request, self.config.vocab_size, self.max_model_len)
        kinds = self.config.token_types
        if kinds == 1:  # no segment embeddings, even if the tokenizer returns token types
            request = msgspec.structs.replace(request, token_type_ids=None)
        if any(not 0 <= kind < kinds for kind in request.token_type_ids or ()):
            raise InvalidParameterError(f"token_type_ids must be 0 to {kinds - 1} for this model", "token_type_ids")
        plan = self._logits_plan(request) if self.pooling is None else self.pooling.plan(request.pooling, self.head)
        sequence = Sequence(request, 0, order=-1)
        sequence.entries = entries
        return [PooledText(sequence, plan)]

    def _logits_plan(self, request: PoolingRequest) -> PoolingPlan:
        """Return the plan for `EncoderConfig.scores`: the runner's `hidden_sum` then reads the text's logits."""
        head, activate = PooledHead(likelihood=self.config.likelihood), request.pooling.use_activation is not False
        count = len(self.config.labels)
        return PoolingPlan(POOLING_METHODS["cls"], normalize=False, dimensions=count, head=head, activate=activate)


@dataclasses.dataclass(eq=False)
class DecoderPreparation(Preparation):
    """Turns requests to a decoder into sequences.

    Args:
        tokenizer: the model's tokenizer.
        eos_token_ids: the model's end-of-sequence tokens.
        vocab_size: V, the width of the logits.
        max_model_len: see `Preparation`.
        pooling: pools hidden states to vectors; None to refuse pooling requests.
        head: layers after the pooling; None without such layers.
        seed: seed of the generator of seeds for requests without one; None for random seeds.
        adapters: see `Preparation`.
        images: finds the positions of images in a prompt; None for a text-only model.
        open_objects: see `LlguidanceBackend`.
        answer_window: see `ModelConfig`.
    """

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    _: dataclasses.KW_ONLY
    pooling: ModelPooling | None = None
    head: PooledHead | None = None
    seed: dataclasses.InitVar[int | None] = None
    adapters: AdapterStore | None = None
    images: VisionInput | None = None
    open_objects: bool = False
    answer_window: int | None = None

    def __post_init__(self, seed: int | None) -> None:
        tokenizer, vocab_size, ends = self.tokenizer, self.vocab_size, self.eos_token_ids
        self._suppressed, self._ends = [[index] for index in tokenizer.suppressed_token_ids], frozenset(ends)
        self._grammars = LlguidanceBackend(tokenizer, vocab_size, ends, open_objects=self.open_objects)
        self._breakers = BreakerTable(tokenizer, vocab_size)
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()  # noqa: S311

    def prepare(self, request: GenerationRequest) -> Seq[Live]:
        if isinstance(request, PoolingRequest):
            return [self._prepare_pooled(request)]
        max_length = check_request(request, self.vocab_size, self.max_model_len)
        params, prompt = request.params, request.prompt_token_ids
        entries = self._entries(request.adapters) if request.adapters else ()
        placed = self._placed(request) if request.images else ()
        form, budget = params.structured_outputs, params.thinking_token_budget
        thinks = params.thoughts is not None or (budget is not None and budget >= 0)
        state = SamplingState(
            params,
            prompt,
            seed=None if params.seed is not None else self._seeds.getrandbits(63),
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            bad_word_token_ids=self._bad_words(params.bad_words) if params.bad_words else self._suppressed,
            grammar=None if form is None else self._grammar(form, params),
            thoughts=self._thoughts(params, prompt) if thinks else None,
            breakers=self._breakers.of_request(params) if params.dry_multiplier else None,
        )
        states = [state, *(state.sibling(index) for index in range(1, params.n))]
        predicted = None if params.prediction is None else self._prediction(params.prediction)
        made: list[LiveSequence] = []
        for index, own in enumerate(states):
            images = tuple(msgspec.structs.replace(each) for each in placed)
            sequence = Sequence(request, index, order=-1, entries=entries, images=images)
            sequence.answer_window = self.answer_window
            made.append(LiveSequence(sequence, own, self.tokenizer, self._ends, max_length, predicted))
        return made

    def _placed(self, request: GenerationRequest) -> list[PlacedImage]:
        """Return a request's images with their positions in the prompt."""
        if self.images is None:
            raise InvalidParameterError("image: the model takes text only", "image")
        made, vision = list[PlacedImage](), self.images
        for image, places in zip(request.images, vision.places(request.prompt_token_ids, request.images)):
            number, shift = len(made), made[-1].shift if made else 0
            spans = vision.spans(image, places, len(request.prompt_token_ids), self.room)
            turned = vision.turned(request.prompt_token_ids, places, image, number, shift)
            made.append(PlacedImage(image, places.tolist(), spans, None, *turned, blank=vision.parts.blank))
        return made

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        self._grammars.compile(params)

    def close(self) -> None:
        self._grammars.close()

    def _prepare_pooled(self, request: PoolingRequest) -> PooledText:
        classes = self.head is not None and bool(self.head.labels)
        if (request.task != "embed") != classes or self.pooling is None:
            raise InvalidParameterError(
                "the model has a head for scores or classes and gives no vectors: request scores or classes"
                if classes
                else "the model gives vectors and has no head for scores or classes: request vectors",
                "task",
            )
        check_pooling_request(request, self.vocab_size, self.max_model_len)
        plan = self.pooling.plan(request.pooling, self.head)
        whole = plan.method.positions != "last"  # the prefix cache has no hidden states
        params = msgspec.structs.replace(request.params, seed=0, skip_reading_prefix_cache=whole)
        sequence = Sequence(msgspec.structs.replace(request, params=params), 0, order=-1)
        sequence.answer_window = self.answer_window
        sequence.entries = self._entries(request.adapters) if request.adapters else ()
        sequence.images = tuple(self._placed(request)) if request.images else ()
        return PooledText(sequence, plan)

    def _grammar(self, form: StructuredOutputsParams, params: SamplingParams) -> GrammarState:
        return GrammarState(self._grammars, form, self.vocab_size, self.eos_token_ids if params.ignore_eos else ())

    def _thoughts(self, params: SamplingParams, prompt: Seq[int]) -> ThoughtCount:
        text = self.tokenizer

        def encode(mark: str, special: bool = True) -> Seq[int]:
            return text.encode(mark, add_special_tokens=False, parse_special=special)

        budget = params.thoughts or budget_in_tokens(params.thinking_token_budget or 0, encode, prompt, self._ends)
        return ThoughtCount(ThoughtLimit(budget, encode, text.token_bytes, text.special_token_ids))

    def _prediction(self, text: str) -> Prediction:
        tokens = self.tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        if len(tokens) > self.max_model_len:
            raise InvalidParameterError(
                f"prediction has {len(tokens)} tokens, but prompt and answer together at most {self.max_model_len}",
                "prediction",
            )
        return Prediction(tokens)

    def _bad_words(self, words: Seq[str]) -> list[list[int]]:
        """Return the token ids of each bad word at the start of a text, and after a space, and suppressed tokens."""
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        return [*filter(None, self.tokenizer.encode_batch(texts, add_special_tokens=False)), *self._suppressed]


# --- checks ---------------------------------------------------------------------------------------------------------


def check_request(request: GenerationRequest, vocab_size: int, max_model_len: int) -> int:
    """Check a request; return the maximum length of its sequences, in tokens. Raises InvalidParameterError or
    PromptTooLongError, whose message has the limit."""
    prompt, params, most = request.prompt_token_ids, request.params, max_model_len
    if not prompt:
        raise InvalidParameterError("the prompt is empty: it needs at least one token", "prompt")
    _check_ids(prompt, vocab_size)
    if not all(token < vocab_size for token in params.logprob_token_ids or ()):
        raise InvalidParameterError(f"logprob_token_ids has ids above {vocab_size - 1}", "logprob_token_ids")
    if len(prompt) >= most:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and this model's maximum context length is {most} tokens: shorten "
            "the prompt, or load the model with a larger `max_model_len` where the model and the memory allow it",
            "prompt",
        )
    if len(prompt) + params.min_tokens > most:
        raise InvalidParameterError(
            f"min_tokens is {params.min_tokens}, but the context of {most} leaves {most - len(prompt)} after the "
            f"prompt: ask for at most {most - len(prompt)}",
            "min_tokens",
        )
    if params.max_tokens is None:
        return most
    if len(prompt) + params.max_tokens > most:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together they are more, "
            f"and this model's maximum context length is {most} tokens; ask for at most {most - len(prompt)}",
            "max_tokens",
        )
    return len(prompt) + params.max_tokens


def check_pooling_request(request: PoolingRequest, vocab_size: int, max_model_len: int) -> None:
    """Check a pooling request; its text may fill the whole context, because no token is generated. Raises as
    `check_request`."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidParameterError("the text is empty: it needs at least one token", "prompt")
    _check_ids(prompt, vocab_size)
    if len(prompt) > max_model_len:
        raise PromptTooLongError(
            f"the text has {len(prompt)} tokens and the model takes at most {max_model_len}: shorten it or split it, "
            "or load the model with a larger `max_model_len` where the model allows it",
            "prompt",
        )
    types = request.token_type_ids
    if types is not None and len(types) != len(prompt):
        raise InvalidParameterError(f"give {len(prompt)} token_type_ids, one for each token", "token_type_ids")


def pooling_tasks(labels: Seq[str], pooling: str | None = None) -> tuple[str, ...]:
    """Return `ModelInfo.tasks` of a model that generates no text, with these `labels` of its head (none without a head)
    and this `pooling` before it, see `EncoderConfig.head_pooling`."""
    if not labels:
        return ("embed", "score")
    return ("score", "classify") if len(labels) == 1 and pooling not in BY_TOKEN else ("classify",)


def check_encoder_task(name: str, wanted: str, tasks: Seq[str]) -> None:
    """Check that an encoder `name` can do the task `wanted`; raises InvalidParameterError, which says what to request
    instead.

    `tasks` are its `ModelInfo.tasks`. A cross-encoder also classifies, with its score as the only class.
    """
    if "embed" in tasks:
        way = "request vectors or scores (/v1/embeddings, /v1/score, /v1/rerank)"
        kind, does = "an embedding model", ("embed",)
    elif "score" in tasks:
        kind, does = "a cross-encoder", ("score", "classify")
        way = "request scores of pairs of texts (/v1/score, /v1/rerank)"
    else:
        kind, does, way = "a classifier", ("classify",), "request classes"
    if wanted not in does:
        lacks = {"generate": "generates no text", "embed": "gives no vectors"}
        lacks |= {"score": "has no head for scores", "classify": "has no head for classes"}
        raise InvalidParameterError(f"{name} is {kind} and {lacks[wanted]}: {way}", "model")


def _check_ids(prompt: Seq[int], vocab_size: int) -> None:
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        named = f"token id {wrong:d}" if abs(wrong) < 1 << 63 else "a token id"
        raise InvalidParameterError(
            f"{named} is out of vocabulary: the model's ids are 0 to {vocab_size - 1}", "prompt"
        )


def check_text_length(info: ModelInfo, tokenizer: Tokenizer, characters: int, name: str = "prompt") -> None:
    """Refuse a text that is too long for the context by its number of characters, before it is tokenized."""
    most = info.max_model_len * tokenizer.longest_token
    most = most if "generate" in info.tasks else max(most, MAX_TEXT)
    if characters > most:
        raise PromptTooLongError(
            f"the text has {characters} characters; this model's maximum context length is {info.max_model_len} "
            f"tokens, which hold at most {most} of them",
            name,
        )
