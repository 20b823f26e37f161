# SPDX-License-Identifier: MIT
"""Cog predictor of a model: weights from a folder, an archive or Hugging Face, streamed text, 32 requests at once."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import cog
from cog import AsyncConcatenateIterator, BaseRunner, Input
from prompt_templates import COMPLETION, BadTemplate, IgnoresPrompt, render

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import (
    CandleVllmError,
    ChatTemplateError,
    ConfigError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.core.vllm.arguments import translated
from candle_vllm.server.models.archives import Archive, fetch_archive, model_folder

logger = logging.getLogger("candle_vllm.cog")

CONFIG = "predictor_config.json"
VOLUME = Path(os.environ.get("CANDLE_VLLM_COG_WEIGHTS_VOLUME", "/weights"))
CHECKPOINTS = Path("checkpoints")
AT_ONCE = 32
CODES = {
    "E1000": "GenericError",
    "E1001": "",  # reserved, never used
    "E1002": "PromptTooLong",
    "E1003": "BadPromptTemplate",
    "E1004": "PromptTemplateError",
    "E1005": "ImageLoadError",
    "E1200": "EngineError",
    "E1201": "UnexpectedEngineArg",
    "E1202": "InvalidPredictorConfig",
}


class UserError(Exception):
    """An error that a user can correct; the message has a code of `CODES`, its name, and a sentence."""

    def __init__(self, code: str, said: str) -> None:
        super().__init__(f"{code} {CODES[code]}: {said}")
        self.code = code


class PredictorConfig(NamedTuple):
    """Contents of `predictor_config.json`.

    Attributes:
        prompt_template: replaces the model's chat template; a template, or a name in `prompt_templates.NAMED`.
        engine_args: arguments of the engine, by the names of vLLM or of `EngineConfig`.
    """

    prompt_template: str | None = None
    engine_args: Mapping[str, Any] = {}

    @classmethod
    def read(cls, folders: list[Path]) -> PredictorConfig:
        """Return the first configuration in `folders`, or the defaults without one; raises `UserError`."""
        for path in (folder / CONFIG for folder in folders):
            if path.is_file():
                try:
                    given = json.loads(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise UserError("E1202", f"{path} is no JSON: {error}") from None
                if not isinstance(given, dict) or given.keys() - {*cls._fields}:
                    raise UserError("E1202", f"{path} has other keys than {', '.join(cls._fields)}")
                config = cls(given.get("prompt_template"), given.get("engine_args") or {})
                if not isinstance(config.engine_args, dict):
                    raise UserError("E1202", f"engine_args of {path} is no object")
                if not isinstance(config.prompt_template, (str, type(None))):
                    raise UserError("E1202", f"prompt_template of {path} is no text")
                logger.info("settings are those of %s", path)
                return config
        return cls()


def resolve_weights(weights: str) -> str:
    """Return the folder or file of the weights, to which an archive is unpacked, or a Hugging Face id.

    An archive that is complete in the volume or in `checkpoints` is not fetched again.
    """
    if weights.startswith("file://"):
        weights = weights.removeprefix("file://")
    try:
        checksum = os.environ.get("COG_WEIGHTS_SHA256")
        archive = Archive.of(f"{weights.partition('#sha256=')[0]}#sha256={checksum}" if checksum else weights)
        if archive is not None:
            roots = [VOLUME / "vllm", CHECKPOINTS] if VOLUME.is_dir() else [CHECKPOINTS]
            for root in roots:
                if archive.is_in(root):
                    return str(model_folder(archive.folder_in(root)))
            return str(fetch_archive(archive, _writable(roots)))
        path = Path(weights)
        if path.is_dir():
            if not any(path.iterdir()):
                raise UserError("E1000", f"the folder {weights} is empty")
            return str(model_folder(path))
        if path.is_file() or (weights.count("/") == 1 and not weights.startswith((".", "/"))) or weights == "demo":
            return weights
    except (CandleVllmError, OSError) as error:
        raise UserError("E1000", str(error)) from None
    raise UserError(
        "E1000", f"{weights!r:.200} is no folder or file here, no address of a tar archive and no Hugging Face id"
    )


def _writable(roots: list[Path]) -> Path:
    """Return the first folder that is writable, created if necessary; otherwise raise the OSError of the last one."""
    problem = OSError("no folder was given")
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problem = error
        else:
            return root
    raise problem


def gpus() -> int:
    """Return the number of GPUs that this process may use; torch is imported only if there is a driver."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


class Runner(BaseRunner):
    """One model; concurrent predictions share its batches."""

    async def setup(self, weights: Optional[str] = None) -> None:  # noqa: UP045  # as Cog reads it
        """Fetch and load the weights, and generate a few tokens as a check.

        Args:
            weights: `COG_WEIGHTS`: a folder, a file, the path or address of a tar archive, or a Hugging Face id.

        Raises:
            UserError: the weights, the settings or the prompt template cannot be used.
        """
        given = str(weights or os.environ.get("COG_WEIGHTS") or "")
        if not given:
            raise UserError("E1000", "no weights: set COG_WEIGHTS to a folder, an address of a .tar or a model's id")
        source = await asyncio.to_thread(resolve_weights, given)
        self.config = PredictorConfig.read([Path(source), Path()] if Path(source).is_dir() else [Path()])
        self.engine = await asyncio.to_thread(self._load, source, self.config.engine_args)
        self.bos = self.engine.detokenize(self.engine.tokenize(""), skip_special_tokens=False)
        try:
            self.engine.apply_chat_template([{"role": "user", "content": "hi"}])
            self.chats = True
        except ChatTemplateError:
            self.chats = False
        if self.config.prompt_template:
            self._templated(self.config.prompt_template, "hi", "", "")
        said = [piece async for piece in self.run(prompt="hi", max_tokens=3)]
        logger.info("the model answers: %r", "".join(said))

    def healthcheck(self) -> bool:
        """Whether the engine runs; Cog calls this for `/health-check`."""
        return self.engine.is_alive

    def _load(self, source: str, engine_args: Mapping[str, Any]) -> InferenceEngine:
        args = {"max_num_seqs": AT_ONCE, **engine_args}
        if "device" not in args:
            args.setdefault("tensor_parallel_size", max(1, gpus()))
        try:
            config = translated(source, args).config
        except TypeError as error:
            raise UserError("E1201", str(error)) from None
        except ConfigError as error:
            raise UserError("E1202", str(error)) from None
        try:
            return InferenceEngine(config)
        except CandleVllmError as error:
            raise UserError("E1200", str(error)) from None

    @cog.streaming
    @cog.concurrent(max=32)
    async def run(
        self,
        prompt: str = Input(description="Prompt that the model continues or answers.", default=""),
        image: Optional[cog.Path] = Input(description="Image, for a vision model.", default=None),  # noqa: B008, UP045
        system_prompt: str = Input(
            description="System prompt.",
            default="You are a helpful assistant.",
        ),
        min_tokens: int = Input(description="Minimum number of tokens of the answer.", ge=0, default=0),
        max_tokens: int = Input(description="Maximum number of tokens of the answer.", ge=1, default=512),
        temperature: float = Input(description="Sampling temperature; 0 is greedy.", ge=0, le=5, default=0.6),
        top_p: float = Input(description="Nucleus sampling: sum of probabilities.", ge=0.01, le=1, default=0.9),
        top_k: int = Input(description="Number of likeliest tokens to sample from; 0: all.", ge=0, default=50),
        presence_penalty: float = Input(description="Penalty for generated tokens.", ge=-2, le=2, default=0.0),
        frequency_penalty: float = Input(description="The same, for each occurrence.", ge=-2, le=2, default=0.0),
        stop_sequences: str = Input(
            description="Texts that end the answer, separated by commas, or a JSON list of texts.", default=""
        ),
        prompt_template: str = Input(
            description="Replaces the model's template: Jinja, a text with {prompt}, or a name such as COMPLETION.",
            default="",
        ),
        seed: Optional[int] = Input(description="Seed of the sampling; random if absent.", ge=0, default=None),  # noqa: UP045
    ) -> AsyncConcatenateIterator[str]:
        """Stream the answer."""
        asked = {name: value for name, value in locals().items() if name != "self"}
        # In a call without Cog, an argument that is not given is its `Input` object.
        asked = {name: value.default if isinstance(value, cog.FieldInfo) else value for name, value in asked.items()}
        try:
            async for text in self._stream(**asked):
                yield text
        except PromptTooLongError as error:
            raise UserError("E1002", str(error)) from None
        except RequestError as error:
            raise UserError("E1000", str(error)) from None

    async def _stream(
        self,
        prompt: str,
        system_prompt: str,
        image: Any,
        stop_sequences: str,
        prompt_template: str,
        seed: int | None,
        max_tokens: int,
        **sampling: Any,
    ) -> Any:
        request = self._prompt(prompt, system_prompt, prompt_template, image)
        limit, taken = self.engine.model_info.max_model_len, len(request["prompt_token_ids"])
        if taken + 1 > limit:
            raise UserError("E1002", f"the prompt has {taken:,} tokens, and the model's context {limit:,}")
        sampling["min_tokens"] = min(sampling["min_tokens"], max_tokens)
        params = SamplingParams(
            max_tokens=min(max_tokens, limit - taken),
            seed=secrets.randbelow(1 << 31) if seed is None else seed,
            stop=_stops(stop_sequences),
            **sampling,
        )
        made = 0
        try:
            stream = self.engine.stream(request, params, add_special_tokens=False)
        except InvalidParameterError as error:
            raise UserError("E1005" if image is not None else "E1000", str(error)) from None
        try:
            async for piece in stream:
                made += len(piece.token_ids)
                if piece.error is not None:
                    raise UserError("E1000" if piece.error_kind == "request" else "E1200", piece.error)
                if piece.text:
                    yield piece.text
        finally:
            await stream.aclose()
        self.record_metric("input_token_count", taken)
        self.record_metric("output_token_count", made)

    def _prompt(self, prompt: str, system_prompt: str, template: str, image: Any) -> dict[str, Any]:
        """Return the text, tokens and image of a prompt; the template is the request's, the config's or the model's."""
        pictures = []
        if image is not None:
            try:
                pictures.append(Path(image).read_bytes())
            except OSError as error:
                raise UserError("E1005", f"the picture cannot be read: {error.strerror}") from None
        chosen = template or self.config.prompt_template
        if chosen or not self.chats:
            text = self._templated(chosen or COMPLETION, prompt, system_prompt, template)
        else:
            text = self._conversation(prompt, system_prompt, pictures)
        adds = not (self.bos and text.startswith(self.bos)) and (bool(chosen) or not self.chats)
        request: dict[str, Any] = {"prompt": text, "prompt_token_ids": self.engine.tokenize(text, adds)}
        return {**request, "multi_modal_data": {"image": pictures}} if pictures else request

    def _templated(self, chosen: str, prompt: str, system_prompt: str, given: str) -> str:
        def jinja(messages: list[dict[str, Any]], source: str, values: dict[str, str]) -> str:
            if "system_prompt" in source:  # it writes the system prompt itself
                messages = [message for message in messages if message["role"] != "system"]
            return self.engine.apply_chat_template(messages, chat_template=source, chat_template_kwargs=values)

        try:
            return render(chosen, prompt, system_prompt, jinja)
        except IgnoresPrompt as error:
            raise UserError("E1003", str(error)) from None
        except BadTemplate as error:
            hint = ". Was the prompt submitted as prompt_template?" if len(given) > len(prompt) else ""
            raise UserError("E1004", f"{error}{hint}") from None

    def _conversation(self, prompt: str, system_prompt: str, pictures: list[bytes]) -> str:
        """Render with the model's template; if it refuses system messages, the system prompt precedes the prompt."""

        def messages(system: str, text: str) -> list[dict[str, Any]]:
            shown: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
            asked = {"role": "user", "content": [*shown, {"type": "text", "text": text}] if pictures else text}
            return [{"role": "system", "content": system}, asked] if system else [asked]

        try:
            try:
                return self.engine.apply_chat_template(messages(system_prompt, prompt))
            except ChatTemplateError:
                return self.engine.apply_chat_template(messages("", f"{system_prompt}\n\n{prompt}".strip()))
        except ChatTemplateError as error:
            raise UserError("E1004", str(error)) from None
        except InvalidParameterError as error:
            raise UserError("E1005" if pictures else "E1000", str(error)) from None


def _stops(text: str) -> list[str]:
    if text.startswith("["):
        try:
            read = json.loads(text)
        except ValueError:
            read = None
        if isinstance(read, list) and all(isinstance(each, str) for each in read):
            return read
    return [each for each in text.split(",") if each]


Predictor = Runner
