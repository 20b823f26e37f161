# SPDX-License-Identifier: MIT
"""Descriptions of models on this machine from their files, without loading them.

The modules that read model files are imported inside the functions, because their import takes long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.table import FormatOptions, ModelOptions

if TYPE_CHECKING:
    from candle_vllm.core.assembly.model import Described
    from candle_vllm.openai.formats.choice import Choice


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A model's properties from its files; the weights are not read.

    Attributes:
        format: format of the files: gguf, safetensors or dummy.
        num_parameters: number of parameters; 0 if unknown.
        quantization: quantization format, or data type of most weights; "" for an encoder.
        context: maximum number of tokens of a prompt and its answer together; 0 for an encoder.
        file_bytes: size of the weight files.
        tasks: tasks of a loaded model; `describe` returns "generate", or "embed" for every encoder.
        tools: whether its prompts show tools and its output is parsed for calls.
        thinks: whether its output is parsed for reasoning.
        sees: whether it accepts images; known only after it is loaded.
        template: its Jinja chat template; None without a template, or with several.
        sampling: the sampling parameters in its files.
    """

    format: str
    architecture: str
    num_parameters: int
    quantization: str
    context: int
    file_bytes: int
    tasks: tuple[str, ...] = ("generate",)
    tools: bool = False
    thinks: bool = False
    sees: bool = False
    template: str | None = None
    sampling: Mapping[str, Any] = {}

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the model can do, in Ollama's terms: completion, embedding, rerank, tools, thinking, vision."""
        names = {"generate": "completion", "embed": "embedding", "score": "rerank"}
        more = {"tools": self.tools, "thinking": self.thinks, "vision": self.sees}
        return *(names[task] for task in self.tasks if task in names), *(name for name, has in more.items() if has)


def file_bytes(settings: ModelOptions) -> int:
    """Return the size of a model's weight files in bytes; 0 if they are not on this machine."""
    from candle_vllm.core.errors import CandleVllmError
    from candle_vllm.core.loading.source import model_files

    try:
        return sum(path.stat().st_size for path in model_files(engine_config(settings, offline=True)).weights)
    except (CandleVllmError, OSError):
        return 0


def template_and_formats(model: Described, settings: FormatOptions) -> tuple[Any, Choice]:
    """Return the source of a model's chat template, None without one, and the formats of its calls and reasoning."""
    from candle_vllm.core.text.tokenizer import chat_conventions
    from candle_vllm.openai.planning import AnswerPlanner

    template = None if model.template is None else model.template.source
    planner = AnswerPlanner(
        chat_conventions(model.tokenizer, template),
        model.config.model_type,
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser,
    )
    return template, planner.choice


def describe(settings: ModelOptions) -> Description:
    """Describe a model from its files; nothing is downloaded.

    CandleVllmError if the model is not on this machine, or it cannot be served.
    """
    from candle_vllm.core.assembly.encoder import is_encoder
    from candle_vllm.core.assembly.model import describe_model
    from candle_vllm.core.assembly.opening import open_model
    from candle_vllm.core.devices import CPU
    from candle_vllm.core.fields import read_json
    from candle_vllm.core.loading.source import model_files

    config = engine_config(settings, offline=True)
    files = model_files(config)
    size = sum(path.stat().st_size for path in files.weights)
    opened = open_model(files, CPU)
    if is_encoder(files):
        opened.checkpoint.close()
        kind = opened.metadata.get("general.architecture") or read_json(files.config or files.folder).get("model_type")
        return Description(format=files.format, architecture=str(kind), num_parameters=0, quantization="", context=0,
                           file_bytes=size, tasks=("embed",))  # fmt: skip
    with opened.checkpoint:
        model = describe_model(config, CPU, opened)
    template, choice = template_and_formats(model, settings)
    return Description(
        format=files.format,
        architecture=model.config.model_type,
        num_parameters=model.num_parameters,
        quantization=(model.quantization or str(model.dtype)).partition(" ")[0],
        context=model.config.max_position,
        file_bytes=size,
        tools=choice.shows_tools,
        thinks=choice.reasoning is not None,
        template=template if isinstance(template, str) else None,
        sampling=dict(model.default_sampling),
    )
