# SPDX-License-Identifier: MIT
"""Tiny random models of every family, made and saved by transformers, and the logits that both sides give."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextPreTrainedModel, Glm5NextTextModel
from transformers.models.mistral4 import Mistral4Config, Mistral4ForCausalLM
from transformers.models.muse_glimmer.configuration_muse_glimmer import MuseGlimmerTextConfig
from transformers.models.muse_glimmer.modeling_muse_glimmer import MuseGlimmerPreTrainedModel, MuseGlimmerTextModel
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrTextConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import (
    UnlimitedOcrTextModel,
    UnlimitedOcrTextPreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner, StepLimits
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.sequence import Run, RunState, Sequence
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.cache_specs import NO_STATES, StateRoom, states
from candle_vllm.core.models.family import Decoder
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing.toy_model import TOY_VOCAB_SIZE, write_toy_tokenizer

AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)  # which transformers left out


class MuseGlimmerForCausalLM(MuseGlimmerPreTrainedModel, GenerationMixin):
    """transformers' text model with the head that its multimodal class has."""

    config_class = MuseGlimmerTextConfig

    def __init__(self, config: MuseGlimmerTextConfig) -> None:
        super().__init__(config)
        self.model = MuseGlimmerTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Scaled and capped logits."""
        logits, cap = self.lm_head(self.model(input_ids=input_ids)[0]), self.config.final_logit_softcapping
        return CausalLMOutput(logits=cap * torch.tanh(logits * self.config.output_multiplier / cap))


class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """transformers' text model with a head."""

    config_class = Step3p7TextConfig

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Logits."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids=input_ids)[0]))


class DeepseekOcr2ForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """transformers' text model with a head."""

    config_class = DeepseekOcr2TextConfig

    def __init__(self, config: DeepseekOcr2TextConfig) -> None:
        super().__init__(config)
        self.model = DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Logits."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids=input_ids)[0]))


class Glm5NextForCausalLM(Glm5NextPreTrainedModel, GenerationMixin):
    """transformers' text model with a head."""

    config_class = Glm5NextTextConfig

    def __init__(self, config: Glm5NextTextConfig) -> None:
        super().__init__(config)
        self.model = Glm5NextTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Logits."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids=input_ids)[0]))


class UnlimitedOcrForCausalLM(UnlimitedOcrTextPreTrainedModel, GenerationMixin):
    """transformers' text model with a head."""

    config_class = UnlimitedOcrTextConfig

    def __init__(self, config: UnlimitedOcrTextConfig) -> None:
        super().__init__(config)
        self.model = UnlimitedOcrTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> CausalLMOutput:
        """Logits; the first tokens that the cache gets are its prompt."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, past_key_values=past_key_values)[0]))


AutoModelForCausalLM.register(DeepseekOcr2TextConfig, DeepseekOcr2ForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(Glm5NextTextConfig, Glm5NextForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(MuseGlimmerTextConfig, MuseGlimmerForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(Step3p7TextConfig, Step3p5ForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(UnlimitedOcrTextConfig, UnlimitedOcrForCausalLM, exist_ok=True)

CPU = torch.device("cpu")
LENGTH, BLOCK = 70, 16

SMALL: Mapping[str, Any] = {
    "vocab_size": TOY_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 258,
}


def write_tiny(folder: Path, model_type: str, *, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint as transformers saves it, with every weight random: biases and norms too, so that none is idle.

    Args:
        folder: where it goes.
        model_type: Hugging Face's.
        seed: of the weights.
        overrides: of `SMALL`, or more keys of the family's config; None takes a key of `SMALL` out, others are null.
    """
    transformers_logging.set_verbosity_error()
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    model.save_pretrained(folder)
    write_toy_tokenizer(folder)
    return folder


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """transformers' config of a tiny model; arguments as for `write_tiny`."""
    values = {key: value for key, value in (dict(SMALL) | overrides).items() if value is not None or key not in SMALL}
    return AutoConfig.for_model(model_type, **values)


def randomise(model: torch.nn.Module) -> None:
    """Matrices whose products keep the size of what they multiply; norms near what they are, biases small.

    States decay so slowly that they hold more than the last token. Both factors of the SwiGLU of Step and GLM-5.3-Flash
    go beyond its limits.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    unscaled = model_type.startswith(("gemma4", "gemma3n"))
    limited = 12.0 if model_type.startswith("step3") else 6.0 if model_type.startswith("glm5_next") else 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(-4.0, 0.0)
            elif weight.dim() >= 2:
                gain = 3.0 if "embed" in name or "lm_head" in name else 1.0
                if limited and ".mlp." in name:
                    wide = "up_proj" in name or "gate_proj" in name
                    gain = limited if wide else 1.2 / limited if "down_proj" in name else gain
                weight.normal_(0.0, gain * weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
                if unscaled and name.endswith("q_norm.weight"):
                    weight.mul_(len(weight) ** -0.5)  # scores are not scaled: norms learn to do that
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("tid2eid"):  # distinct experts for each token
                experts = torch.rand(len(buffer), model.config.n_routed_experts).argsort(1)
                buffer.copy_(experts[:, : buffer.shape[1]])
            elif name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.2)


def some_tokens(count: int = LENGTH) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(5)).tolist()


def load(source: Path, **settings: Any) -> LoadedModel:
    """What is loaded; of models that see, the text model alone where `max_images` is not set."""
    return load_model(
        EngineConfig(model=str(source), **{"max_images": 0, "block_size": BLOCK} | settings), CPU, lambda *_: None
    )


def eager_logits(source: Path, tokens: list[int], chunks: list[int], **settings: Any) -> torch.Tensor:
    """Logits [T, V] of every position in torch, the prompt run in chunks of these sizes over a paged cache."""
    loaded = load(source, op_by_op=True, **settings)
    return step_logits(eager_runner(loaded, -(-len(tokens) // BLOCK)), tokens, chunks)


def room_of(decoder: Decoder) -> StateRoom:
    """Room for the states of one sequence, where the model's layers keep any."""
    return StateRoom(1, 0, 0) if states(decoder.config.cache_specs) else NO_STATES


def eager_runner(loaded: LoadedModel, blocks: int) -> EagerRunner:
    """What runs a model in torch and fp32, a sequence at a time."""
    return EagerRunner(loaded.decoder, blocks, BLOCK, CPU, torch.float32, room=room_of(loaded.decoder))


def device_logits(source: Path, tokens: list[int], chunks: list[int], **settings: Any) -> torch.Tensor:
    """The same with the matrices as a GPU holds them, by the references of its kernels and in fp32."""
    usual = loading.choose_placement

    def placed(*arguments: Any) -> Placement:
        return dataclasses.replace(usual(*arguments), keeps_quantised=True)

    with mock.patch.object(loading, "choose_placement", placed):
        loaded = load(source, op_by_op=True, **settings)
    return step_logits(eager_runner(loaded, -(-len(tokens) // BLOCK)), tokens, chunks)


def recorded_logits(source: Path, tokens: list[int], chunks: list[int], **settings: Any) -> torch.Tensor:
    """The same from the compiled CPU kernels, whose cache is bfloat16."""
    loaded = load(source, block_size=BLOCK, **settings)
    assert loaded.placement.recorded, "the model runs op by op"
    blocks = -(-len(tokens) // BLOCK)
    limits = StepLimits(
        tokens=max(64, max(chunks)), sequences=4, logit_rows=64, table_width=blocks, block_size=BLOCK, threads=2
    )
    runner = RecordedRunner(loaded.decoder, blocks, limits, room=room_of(loaded.decoder))
    try:
        return step_logits(runner, tokens, chunks)
    finally:
        runner.close()


def step_logits(
    runner: ModelRunner,
    tokens: list[int],
    chunks: list[int],
    adapters: Any = (),
    *,
    state: Callable[[int], RunState] = lambda start: RunState(0, 0 if start else -1),
) -> torch.Tensor:
    """Logits [T, V] of every position, a step for each chunk.

    `state` names the state that a chunk begins with and the one that it writes, given the chunk's first position.
    """
    request = GenerationRequest(request_id="r", prompt_token_ids=tokens, params=SamplingParams())
    sequence = Sequence(request, 0, 0)
    sequence.adapters = adapters
    sequence.block_table = array("i", reversed(range(-(-len(tokens) // BLOCK))))
    decoder: Any = getattr(runner, "decoder", getattr(runner, "_decoder", None))
    found, start, keeps = [], 0, room_of(decoder) is not NO_STATES
    for chunk in chunks:
        sequence.num_uncomputed_tokens = len(tokens) - start
        item = Run.next(sequence, chunk)
        if keeps:
            item = msgspec.structs.replace(item, state=state(start))
        runner.forward(BatchBuilder(BLOCK, runner.step_memory).build([item]), [])
        scored = (runner.score(np.arange(first, min(first + 64, chunk))) for first in range(0, chunk, 64))
        found += [torch.as_tensor(logits).clone() for logits in scored]
        start += chunk
    assert start == len(tokens)
    return torch.cat(found)


def cuts(count: int = LENGTH) -> list[list[int]]:
    """A prompt whole; and in pieces of 7, with single tokens behind them, as decoding does."""
    pieces = [7] * ((count - 6) // 7)
    return [[count], [*pieces, *[1] * (count - sum(pieces))]]


def their_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' logits [T, V] in fp32. Its eager attention adds Falcon's ALiBi twice."""
    kind = "sdpa" if config_of(folder).get("alibi") else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def spread(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """RMS of the difference over RMS of the logits."""
    return float((ours - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt())


def settled(ours: torch.Tensor, theirs: torch.Tensor, undecided: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without that share of the tokens, those that differ most."""
    apart = (ours - theirs).pow(2).sum(-1)
    kept = apart.argsort()[: len(apart) - int(undecided * len(apart))]
    return ours[kept], theirs[kept]


def typical_spread(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The median of what `spread` says of every token: where rounding chose another expert, a token is wholly other."""
    return float(torch.stack([torch.tensor(spread(a, b)) for a, b in zip(ours, theirs, strict=True)]).median())


def config_of(folder: Path) -> dict[str, Any]:
    """The `config.json` that transformers wrote."""
    return json.loads((folder / "config.json").read_text())
