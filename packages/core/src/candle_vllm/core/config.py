"""EngineConfig: every setting of one engine, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from candle_vllm.core.errors import ConfigError

DType = Literal["auto", "f32", "bf16", "f16"]
LoadFormat = Literal["auto", "dummy"]
KvCacheDType = Literal["auto", "fp8"]
AttentionBackend = Literal["auto", "triton", "torch_flash", "flash_attn", "torch"]

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dtype": ("auto", "f32", "bf16", "f16"),
        "load_format": ("auto", "dummy"),
        "kv_cache_dtype": ("auto", "fp8"),
        "attention_backend": ("auto", "triton", "torch_flash", "flash_attn", "torch"),
    }
)
ISQ_NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2k", "q3k", "q4k", "q5k", "q6k")
"""Types that plain weights can be quantised to while they are loaded."""

MAX_STRETCH = 1024
"""Times that a context can be stretched."""

_SWITCHES = ("offline", "enforce_eager", "cuda_graphs", "deterministic", "enable_prefix_caching")
_OPTIONAL_NUMBERS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "threads", "seed")


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
        isq: quantise plain weights while they are loaded: one of `ISQ_NAMES` (q4_k stands for q4k); None does not. The
            embedding and the head get at least q6k, norms, biases and routers stay plain. Not for GGUF files, for
            weights that are quantised already, or for encoders.
        load_format: "auto" reads the model's weights; "dummy" needs its config.json and tokenizer alone and fills the
            weights with random numbers, to measure a model that is not there.
        device: "auto", "cpu", "cuda" or "cuda:N"; "auto" is the first GPU that can be used, else the CPU.
        dtype: what plain matrices are converted to. On the CPU "auto" keeps the type of each (F64 becomes f32) and
            quantised ones stay as they are. On a GPU it is the type of activations too, "auto" being bf16, or f16
            on Turing. With `enforce_eager`, of all weights and activations, and "auto" is f32 on the CPU.
        enforce_eager: decode the weights and run the layers one by one: on the CPU in torch, which is slow and what the
            kernels are compared with; on a GPU with the same kernels, without CUDA graphs.
        attention_backend: what computes attention on a GPU: "triton" (what "auto" is), "torch_flash" (the
            FlashAttention that torch carries), "flash_attn" (the package of that name) or "torch" (the reference).
        kv_cache_dtype: "auto" keeps keys and values in the type of activations (bf16 on the CPU); "fp8" keeps them as
            float8_e4m3fn with the scales of the checkpoint, or of 1, on GPUs from compute capability 8.9 on.
        cuda_graphs: on a GPU, capture the steps that only decode, of up to 512 sequences, as CUDA graphs.
        max_cudagraph_capture_size: capture steps with prompts, too, where they have at most so many tokens, so that a
            short prompt costs its neighbours one launch and not hundreds; 0 captures none of them. By "triton" alone.
        deterministic: on a GPU, a seeded answer is the same whatever else is in the batch, however its prompt was cut,
            and whatever the prefix cache held. On the CPU it always is.
        yarn_scaling_factor: stretch the context of a model without rotary scaling by YaRN, to this many times its own;
            None leaves it. Short texts lose a little by it.
        max_model_len: longest prompt plus output, in tokens; None is the model's own, or less where memory says so.
        max_num_seqs: most sequences in one step; None is 64 on the CPU, 256 on a GPU.
        max_num_batched_tokens: most tokens in one step, prompts included; None is 512 on the CPU, 8192 on a GPU.
        block_size: tokens in one KV-cache block.
        kv_cache_memory: bytes for the KV cache; None takes `kv_fraction` of what is free after loading.
        kv_fraction: share of the free memory that the KV cache may take, (0, 1); None is 0.4 on the CPU, 0.9 on a GPU.
        enable_prefix_caching: reuse the KV blocks of equal prompt beginnings.
        max_queued_requests: most sequences waiting or running before new requests are refused.
        threads: CPU threads, on a GPU of loading alone; None is one per physical core that the process may use.
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
    isq: str | None = None
    load_format: LoadFormat = "auto"
    device: str = "auto"
    dtype: DType = "auto"
    enforce_eager: bool = False
    attention_backend: AttentionBackend = "auto"
    kv_cache_dtype: KvCacheDType = "auto"
    cuda_graphs: bool = True
    max_cudagraph_capture_size: int = 0
    deterministic: bool = False
    yarn_scaling_factor: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    kv_cache_memory: int | None = None
    kv_fraction: float | None = None
    enable_prefix_caching: bool = True
    max_queued_requests: int = 1024
    threads: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._take_paths()
        for name in ("model", "weight_file", "revision", "hf_token", "chat_template", "isq", "device", *CHOICES):
            self._text(name)
        if self.isq is not None:
            object.__setattr__(self, "isq", isq_name(self.isq))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} {_shown(getattr(self, name))} is neither True nor False", name)
        if not self.model:
            raise ConfigError("model is empty: pass a Hugging Face id, a folder or a .gguf file", "model")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device {self.device!r} is not one of auto, cpu, cuda, cuda:N", "device")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r:.80} is not one of {', '.join(choices)}", name)
        self._check_factor()
        self._within("max_model_len", 1, 1 << 24)
        self._within("max_num_seqs", 1, 4096)
        self._within("max_num_batched_tokens", 1, 1 << 20)
        self._within("max_cudagraph_capture_size", 0, 16384)
        self._within("block_size", 1, 1024)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size {self.block_size} is not a power of two: try 32", "block_size")
        self._within("kv_cache_memory", 1 << 10, 1 << 50)
        self._within("max_queued_requests", 1, 1 << 20)
        self._within("threads", 1, 1024)
        self._within("seed", -(1 << 63), (1 << 64) - 1)
        fraction = self.kv_fraction
        if fraction is not None and (not isinstance(fraction, float) or not 0 < fraction < 1):
            raise ConfigError(
                f"kv_fraction {_shown(self.kv_fraction)} is not a number between 0 and 1: try 0.4", "kv_fraction"
            )

    def _check_factor(self) -> None:
        factor = self.yarn_scaling_factor
        if factor is None:
            return
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor <= MAX_STRETCH:
            raise ConfigError(
                f"yarn_scaling_factor {_shown(factor)} is not a number above 1 and at most {MAX_STRETCH}: try 4.0",
                "yarn_scaling_factor",
            )
        object.__setattr__(self, "yarn_scaling_factor", float(factor))

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
        if not isinstance(value, str) and (value is not None or name in ("model", "device", *CHOICES)):
            shown = "" if name == "hf_token" else f" {_shown(value)}"
            raise ConfigError(f"{name}{shown} is not a text but a {type(value).__name__}", name)

    def _within(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL_NUMBERS:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} {_shown(value)} is not a whole number between {low} and {high}", name)


def isq_name(text: str) -> str:
    """The name in `ISQ_NAMES` that a user's spelling means; q4_k and Q4K stand for q4k.

    Raises:
        ConfigError: none. The mixtures of llama.cpp (q4_k_m) are no types.
    """
    name = text.strip().lower()
    if name in ISQ_NAMES or (name := name.replace("_k", "k")) in ISQ_NAMES:
        return name
    main = re.sub("_[sml]$", "", name)
    hint = f"; {text!r:.60} is a mixture of types, mostly {main}" if main in ISQ_NAMES else ""
    raise ConfigError(f"isq {text!r:.60} is not one of {', '.join(ISQ_NAMES)}{hint}", "isq")


def _shown(value: object) -> str:
    """A value for a message; Python refuses to write out very long numbers."""
    if isinstance(value, int) and abs(value) >= 10**80:
        return "with more than 80 digits"
    return f"{value!r:.80}"
