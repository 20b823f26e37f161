"""EngineConfig: every setting of one engine, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from candle_vllm.core.errors import ConfigError

DType = Literal["auto", "f32", "bf16", "f16"]

DTYPES = ("auto", "f32", "bf16", "f16")
_OPTIONAL_NUMBERS = ("max_model_len", "max_num_batched_tokens", "kv_cache_memory", "threads", "seed")


def cache_folder() -> Path:
    """Where compiled kernels and the like are kept: candle-vllm in the user's cache folder. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "candle-vllm"


_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. A value that cannot work is a `ConfigError` that names it and one that does.

    Attributes:
        model: a Hugging Face id, a folder, or a `.gguf` file.
        weight_file: which weight file of the folder or repository, where there are several.
        revision: branch, tag or commit of a Hugging Face repository.
        hf_token: access token for Hugging Face; None uses the one of `hf auth login`.
        download_dir: where downloads are kept; None is Hugging Face's own cache.
        offline: never use the network.
        tokenizer: folder with a `tokenizer.json` to use instead of the model's own.
        chat_template: Jinja source to use instead of the model's own template.
        device: "auto" or "cpu". "cuda" and "cuda:N" are well formed, and refused when the engine starts: this version
            has no CUDA kernels, and "auto" is the CPU.
        dtype: what plain matrices are converted to; "auto" keeps the type of each (F64 becomes f32). Quantised ones
            stay as they are. With `enforce_eager`, of all weights and activations, and "auto" is f32 on the CPU.
        enforce_eager: run the layers op by op in torch with decoded weights: slow, and what the kernels are compared
            with.
        max_model_len: longest prompt plus output, in tokens; None is the model's own, or less where memory says so.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step, prompts included; None is 512.
        block_size: tokens in one KV-cache block.
        kv_cache_memory: bytes for the KV cache; None takes `kv_fraction` of what is free after loading.
        kv_fraction: share of the free memory that the KV cache may take, (0, 1).
        enable_prefix_caching: reuse the KV blocks of equal prompt beginnings.
        max_queued_requests: most sequences waiting or running before new requests are refused.
        threads: CPU threads; None is one per physical core that the process may use.
        seed: makes requests without a seed of their own reproducible, in order of arrival.
    """

    model: str
    weight_file: str | None = None
    revision: str | None = None
    hf_token: str | None = dataclasses.field(default=None, repr=False)
    download_dir: Path | None = None
    offline: bool = False
    tokenizer: Path | None = None
    chat_template: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    enforce_eager: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    kv_cache_memory: int | None = None
    kv_fraction: float = 0.4
    enable_prefix_caching: bool = True
    max_queued_requests: int = 1024
    threads: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._take_paths()
        for name in ("model", "weight_file", "revision", "hf_token", "chat_template", "device", "dtype"):
            self._text(name)
        for name in ("offline", "enforce_eager", "enable_prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} {_shown(getattr(self, name))} is neither True nor False", name)
        if not self.model:
            raise ConfigError("model is empty: pass a Hugging Face id, a folder or a .gguf file", "model")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device {self.device!r} is not one of auto, cpu, cuda, cuda:N", "device")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}", "dtype")
        self._within("max_model_len", 1, 1 << 24)
        self._within("max_num_seqs", 1, 4096)
        self._within("max_num_batched_tokens", 1, 1 << 20)
        self._within("block_size", 1, 1024)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size {self.block_size} is not a power of two: try 32", "block_size")
        self._within("kv_cache_memory", 1 << 10, 1 << 50)
        self._within("max_queued_requests", 1, 1 << 20)
        self._within("threads", 1, 1024)
        self._within("seed", -(1 << 63), (1 << 64) - 1)
        if not isinstance(self.kv_fraction, float) or not 0 < self.kv_fraction < 1:
            raise ConfigError(
                f"kv_fraction {_shown(self.kv_fraction)} is not a number between 0 and 1: try 0.4", "kv_fraction"
            )

    def _take_paths(self) -> None:
        """Paths and texts stand for each other: `model` becomes a text, the folders become paths."""
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        for name in ("download_dir", "tokenizer"):
            value = getattr(self, name)
            if isinstance(value, str) and value:
                object.__setattr__(self, name, Path(value))
            elif value is not None and not isinstance(value, Path):
                raise ConfigError(f"{name} {_shown(value)} is not a folder", name)

    def _text(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) and (value is not None or name in ("model", "device", "dtype")):
            shown = "" if name == "hf_token" else f" {_shown(value)}"
            raise ConfigError(f"{name}{shown} is not a text but a {type(value).__name__}", name)

    def _within(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL_NUMBERS:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} {_shown(value)} is not a whole number between {low} and {high}", name)


def _shown(value: object) -> str:
    """A value for a message; Python refuses to write out very long numbers."""
    if isinstance(value, int) and abs(value) >= 10**80:
        return "with more than 80 digits"
    return f"{value!r:.80}"
