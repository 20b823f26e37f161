# SPDX-License-Identifier: MIT
"""A decoder that runs transformers' module code, with this engine's caches and matrix products."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.models.any_architecture import trial
from candle_vllm.core.models.any_architecture.attention import PAGED, Pass, under_way
from candle_vllm.core.models.any_architecture.buffers import first_position, make_buffers
from candle_vllm.core.models.any_architecture.config import AnyConfig
from candle_vllm.core.models.any_architecture.modules import replace_products
from candle_vllm.core.models.any_architecture.products import Products

_RECOMPUTED = ("blt", "cpmant")  # models whose results with a cache differ from those without
_ROUTERS = ("gate", "router", "shared_expert_gate")  # modules that `isq` does not quantise


class AnyDecoder:
    """Decoder by a model of transformers: token ids [T] to hidden states [T, E] to logits [T, V].

    Args:
        config: the model's config.
        placement: device and types of the weights; layers run op by op.

    Attributes:
        named: the layers with weights, by transformers' names.
        experts: the layers among them that are matrices of experts.
        stored_shapes: shapes of transformers' own parameters and stored buffers, by their names.
        transposed: names of the layers whose matrices transformers stores transposed.
        targets: where the table of weight names finds each layer: `embed`, `head`, or an index of `parts`.
        narrows: see `DecoderStack`.
    """

    narrows = False

    def __init__(self, config: AnyConfig, placement: Placement) -> None:
        self.config, self._placement = config, placement
        dtype = torch.float32 if placement.shapes_only else placement.torch_dtype
        self.model = trial.without_memory(config.described, None if config.obstacle else PAGED, dtype)
        tables = {self.model.get_input_embeddings(): "embed", self.model.get_output_embeddings(): "head"}
        at = {name: tables[module] for name, module in self.model.named_modules() if module in tables}
        self.stored_shapes = {name: tuple(each.shape) for name, each in self.model.state_dict().items()}
        self.transposed = {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}
        products = Products(placement.product_threads) if placement.product_threads else None
        tied = self.model.all_tied_weights_keys
        self.named, self.experts = replace_products(self.model, placement, tied, products)
        self.parts, self.targets = list[Any](), dict[str, str]()
        for number, (name, layer) in enumerate(self.named.items()):
            router = name.rpartition(".")[2] in _ROUTERS
            self.parts.append(SimpleNamespace(router=layer) if router else layer)
            self.targets[name] = at.get(name, f"parts.{number}{'.router' if router else ''}")
            if name in at:
                setattr(self, at[name], layer)
        if not placement.shapes_only:
            make_buffers(self.model, placement, config.max_position)
        self._base = self.model.get_submodule(trial.layers_of(self.model))
        self._head = _Head(self._base)
        self._attentions = [call.attention(number) for number, call in enumerate(config.calls)]
        self._first_position = first_position(self.model)
        self._cache = dict[str, Any]()  # cache of the only sequence, if transformers keeps it
        self._seen = torch.empty(1, 0, dtype=torch.int64)  # tokens of this sequence
        self._recomputes = config.model_type in _RECOMPUTED or not trial.keeps_its_own_cache(self.model)

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`; transformers computes its rotary tables in each step."""

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """See `Decoder.forward`."""
        ids, positions = token_ids.long()[None], step.positions.long()[None]
        if self.config.obstacle is not None:
            return self._alone(ids, int(positions[0, 0]))
        this = Pass({}, list(self.config.calls), step, self._attentions)
        with under_way(this):
            out = self._base(
                input_ids=ids, position_ids=positions + self._first_position, use_cache=False, return_dict=True
            )
        assert this.done == len(this.calls), "a model's calls of attention are the same in each step"
        return out.last_hidden_state[0]

    def _alone(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Hidden states [T, E] of tokens [1, T] from position `first` on, continuing the cache of the only sequence."""
        if first == 0:
            self._cache, self._seen = dict[str, Any](), ids[:, :0]
        assert first == self._seen.shape[1], "a sequence begins at its first token, and no other runs beside it"
        # Layers with a state read the first part of a prompt at once, and then one token at a time.
        pieces = [ids] if first == 0 else ids.split(1, 1)
        return torch.cat([self._continued(piece) for piece in pieces])

    def _continued(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] of the next tokens [1, T]; without a cache all earlier tokens are computed again."""
        before, self._seen = self._seen.shape[1], torch.cat([self._seen, ids], 1)
        if self._recomputes:
            return self._base(input_ids=self._seen, return_dict=True).last_hidden_state[0, before:]
        positions = torch.arange(before, self._seen.shape[1], device=ids.device)
        places = positions[None] + self._first_position
        given: dict[str, Any] = {"position_ids": places, "cache_position": positions, "use_cache": True}
        given = {name: value for name, value in given.items() if name in trial.arguments(self._base)} | self._cache
        out = self._base(input_ids=ids, return_dict=True, **given)
        self._cache = {name: out[name] for name in trial.CACHES if out.get(name) is not None}
        self._recomputes |= not self._cache
        return out.last_hidden_state[0]

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """See `Decoder.logits`; the class's own code does whatever follows its last norm."""
        self._head.hidden, prefix = hidden[None], trial.layers_of(self.model)
        self.model.set_submodule(prefix, self._head)
        try:
            scores = self.model(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits[0]
        finally:
            self.model.set_submodule(prefix, self._base)
        return scores.float() if out is None else out.copy_(scores)


class _Head(torch.nn.Module):
    """Replaces a model's layers while logits are computed from given hidden states."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self._base = [base]  # in a list, so that it is not registered as a child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_base"][0], name)
            return self if isinstance(found, PreTrainedModel) else found  # some heads call an inner model

    def forward(self, *_: Any, **__: Any) -> _Output:
        """Return the hidden states as the layers' result."""
        assert self.hidden is not None
        return _Output(last_hidden_state=self.hidden)


class _Output(SimpleNamespace):
    """Output of the layers that has only hidden states; all other fields are None."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]
