# SPDX-License-Identifier: MIT
"""The layout of a model family in a GGUF file, and what llama.cpp refuses in such files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError

Keys = dict[str, Any]

DIVISORS = "rope_freqs.weight"
BIASES = (".attn_output.bias", ".ffn_gate.bias", ".ffn_up.bias", ".ffn_down.bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How GGUF files describe a model family.

    Attributes:
        name: value of `general.architecture`.
        more: additional keys, without the architecture's prefix; they take precedence over common keys.
        otherwise: config fields that differ in the file, such as the layout of stored tensors.
        eps: key of the norms' epsilon.
        interleaved: q and k rows are stored in pairs of adjacent rows.
        names: substrings of the names to use for tensors with several GGUF names; for others the first name is used.
        head: llama.cpp requires a head in the file, even if it equals the embedding table.
        log_multiplier: value of `rope.scaling.yarn_log_multiplier` divided by `mscale_all_dim`; None without this key.
        unread: ends of the names of tensors that llama.cpp does not know; it refuses files with such tensors.
        square: llama.cpp requires that all heads together are as wide as the hidden state.
        every: llama.cpp requires experts in all layers.
        norm: whether llama.cpp normalises the weights of chosen experts; None if the file has a key for it.
    """

    name: str
    more: Callable[[Any], Keys] = lambda _: {}
    otherwise: Callable[[Any], Keys] = lambda _: {}
    eps: str = "attention.layer_norm_rms_epsilon"
    interleaved: bool = False
    names: Callable[[Any], Sequence[str]] = lambda _: ()
    head: bool = False
    log_multiplier: float | None = None
    unread: tuple[str, ...] = (DIVISORS, *BIASES)
    square: bool = False
    every: bool = False
    norm: bool | None = None

    def stored(self, config: Any) -> Any:
        """Return the model's config as in a file of this architecture."""
        tied = config.tie_embeddings and not self.head
        usual: Keys = {"interleaved_rotary": self.interleaved, "tie_embeddings": tied, "has_head": True}
        return dataclasses.replace(config, **usual | self.otherwise(config))

    def check(self, config: Any, names: Iterable[str], source: Path) -> None:
        """Refuse a model that llama.cpp would not load, or would compute differently.

        Args:
            names: names of the file's tensors.
            source: path for error messages.

        Raises:
            UnsupportedModelError: the message lists everything that llama.cpp does not support.
        """
        found = tuple(names)
        lacks = [end.removeprefix(".") for end in self.unread if any(name.endswith(end) for name in found)]
        if self.square and config.num_heads * config.head_dim != config.hidden_size:
            lacks.append("heads that together are not as wide as the hidden state")
        mixture = getattr(config, "mixture", None)
        if self.every and len(config.sparse_layers) < config.num_layers:
            lacks.append("layers without experts")
        if mixture is not None and self.norm not in (None, mixture.renormalise):
            lacks.append(f"norm_topk_prob {str(mixture.renormalise).lower()}")
        if lacks:
            raise UnsupportedModelError(
                f"{source}: llama.cpp's {self.name} does not support {', '.join(lacks)}; serve it from its folder with "
                "`isq` to quantise it"
            )
