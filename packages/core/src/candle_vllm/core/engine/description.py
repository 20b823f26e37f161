"""What is said of a loaded model, and how its loading is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from candle_vllm.core.assembly.encoder import LoadedEncoder
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.engine.encoder_engine import EncoderEngine
from candle_vllm.core.engine.engine import Engine
from candle_vllm.core.engine.request import ModelInfo


def model_info(loaded: LoadedModel | LoadedEncoder, engine: Engine | EncoderEngine) -> ModelInfo:
    """What callers may know of a model that an engine serves."""
    vectors = ("embed", "score") if loaded.pooling is not None else ("score",)
    return ModelInfo(
        name=loaded.name,
        architecture=loaded.config.model_type,
        num_parameters=loaded.num_parameters,
        max_model_len=engine.max_model_len,
        vocab_size=loaded.config.vocab_size,
        dtype=loaded.dtype,
        device=str(loaded.placement.device),
        quantization=loaded.quantization,
        weight_bytes=loaded.weight_bytes,
        eos_token_ids=loaded.eos_token_ids,
        has_chat_template=loaded.template is not None,
        default_sampling=loaded.default_sampling,
        tasks=("generate", *vectors) if isinstance(loaded, LoadedModel) and loaded.config.has_head else vectors,
        embedding_size=0 if loaded.pooling is None else loaded.pooling.size,
        max_num_seqs=engine.max_num_seqs,
        kv_cache_bytes=engine.cache_bytes,
    )


@contextmanager
def progress_bar(what: str = "loading") -> Iterator[Any]:
    """A bar for what is done to a model's weights, on a terminal, when it takes longer than a second."""
    with tqdm(desc=what, unit="B", unit_scale=True, delay=1.0, leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
