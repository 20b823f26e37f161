# SPDX-License-Identifier: MIT
"""Objects that are built from settings: the engine and its model, the response store, the mailbox.

Runs before step 1 of a request's life. The functions import the engine when they are called, so that an invalid flag is
reported before that slow import; the mailbox is imported only if it is used.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.core.config import SETTINGS, demo_command, demo_model, is_demo
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.setting_kinds import MAX_TEMPLATE
from candle_vllm.core.shown import without_secrets
from candle_vllm.core.text.special_tokens import CHATML
from candle_vllm.responses.store.backend import BACKENDS, MEMORY, URLS, StoreOptions
from candle_vllm.server.interrupts import leaving_at_once
from candle_vllm.server.settings import table
from candle_vllm.server.settings.adapters import read_specs
from candle_vllm.server.settings.model_names import named_model
from candle_vllm.server.settings.options import UsageError, known_keys
from candle_vllm.server.settings.sources import read_text

if TYPE_CHECKING:
    from candle_vllm.core import EngineConfig, InferenceEngine
    from candle_vllm.core.vision.fetching import ImageSources
    from candle_vllm.openai import OpenAIAdapter
    from candle_vllm.server.mailbox.options import MailboxOptions


SQLITE = "sqlite"
OFF = "off"
RESPONSES_FILE = "sqlite:///~/.candle-vllm/responses.sqlite"
MAILBOX_FILE = ".candle-vllm/mailbox.sqlite"  # in the home folder

_NUMBERS = ("retention_secs", "max_record_bytes", "max_records_per_key", "max_records", "max_deliveries")
_LISTS = ("webhook_allowed_hosts", "webhook_allowed_headers")
_KEYS = ("url", *_NUMBERS, *_LISTS, "webhook_allow_private", "webhook")
_FROM_SETTINGS = ("mailbox_retention_secs", "webhook_allowed_hosts", "webhook_allow_private")

MIB = 1 << 20

logger = logging.getLogger(__name__)


def model_source(settings: table.HubOptions, *, fetch: bool = True, offline: bool = False) -> tuple[str, str | None]:
    """Return the model and its weight file for `EngineConfig`.

    With `fetch`, a model at a URL is downloaded; without `fetch`, its folder or its URL is returned. `offline` allows
    only models that are downloaded already.
    """
    if settings.weight_path is not None:
        if not settings.weight_path.is_dir():
            raise UsageError(f"weight path {settings.weight_path} is not a folder; for one file use --m or --f")
        return str(settings.weight_path), settings.weight_file
    if settings.model is not None:
        if is_demo(settings.model) and (demo := demo_model()) is not None:
            return str(demo), settings.weight_file
        named = named_model(settings.model)
        if "://" in named:
            from candle_vllm.server.models.archives import folder_at, model_at

            cache = cache_folder(settings)
            if fetch:
                named = str(model_at(settings.model, cache, offline=offline or settings.offline))
            else:
                named = str(folder_at(settings.model, cache) or without_secrets(settings.model, alone=True))
        return named, settings.weight_file
    if settings.weight_file is not None:
        if not Path(settings.weight_file).is_file():
            raise UsageError(f"weight file {settings.weight_file} does not exist; for a file of a repository add --m")
        return settings.weight_file, None
    demo = demo_model()
    if demo is None:
        raise UsageError(
            "no model: pass --m with a Hugging Face id, a folder, a .gguf file (for example --m ./model.gguf) or the "
            f"address of one, or install the demo model: {demo_command()}"
        )
    logger.info("no model given: using the demo model %s", demo.stem)
    return str(demo), None


def cache_folder(settings: table.HubOptions) -> Path:
    """Return the folder of downloaded models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(settings.download_dir or HF_HUB_CACHE).expanduser()


def refuse_missing(settings: table.SourceOptions) -> None:
    """Raise ModelNotFoundError, with a similar name, for a model path that does not exist, before slow imports."""
    model = settings.model or ""
    is_path = (model.endswith(".gguf") and ":" not in model) or model.startswith(("/", "./", "../", "~"))
    if settings.weight_path is None and is_path and not os.path.exists(os.path.expanduser(model)):
        from candle_vllm.core.config import EngineConfig
        from candle_vllm.core.loading.source import model_files

        model_files(EngineConfig(model=model))


def refuse_wrong_formats(settings: table.FormatOptions) -> None:
    """Raise ConfigError for unknown tool and reasoning parsers, before a model is loaded."""
    if settings.tool_parser is None and settings.reasoning_parser is None:
        return  # also avoids the import of the parsers
    from candle_vllm.openai.formats.choice import choose_layout

    choose_layout(tool_parser=settings.tool_parser, reasoning_parser=settings.reasoning_parser)


def refuse_wrong_settings(settings: table.AdapterOptions) -> None:
    """Raise ConfigError for unknown parsers, missing adapter files, and adapters without `enable_lora`."""
    refuse_wrong_formats(settings)
    if (settings.lora_modules or settings.lora_warmup) and not settings.enable_lora:
        raise UsageError(f"{'--lora-modules' if settings.lora_modules else '--lora-warmup'} needs --enable-lora")
    fetches = any(not each.startswith("local=") for each in settings.lora_resolver)
    for spec in read_specs(settings.lora_modules):
        from candle_vllm.core.models.jina_tasks import adapter_exists

        if not adapter_exists(Path(spec.path)) and (os.path.isabs(spec.path) or not fetches):
            where = without_secrets(spec.path, alone=True)
            named = "/" in spec.path and spec.path[0].isalnum() and not spec.path.endswith(".gguf")
            more = f"; an adapter of Hugging Face also needs --lora-resolver hf={where}" if named else ""
            text = f"the adapter {spec.name!r:.200} of --lora-modules cannot be loaded: there is no {where}{more}"
            raise UsageError(text)


def thinking_settings(settings: table.FormatOptions) -> dict[str, Any]:
    """Return the reasoning budget and the variables of the chat template that are set, for an API adapter."""
    names = ("reasoning_budget", "reasoning_budget_message", "default_chat_template_kwargs")
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def adapter_of(engine: InferenceEngine, settings: table.FormatOptions, **more: Any) -> OpenAIAdapter:
    """Return an API adapter with the settings for reasoning, and with the arguments `more`."""
    from candle_vllm.openai import OpenAIAdapter

    more |= {"served_model_names": [engine.model_info.name], "reasoning_parser": settings.reasoning_parser}
    return OpenAIAdapter(engine, **thinking_settings(settings), **more)


def image_sources(
    settings: table.RequestOptions, stored: Callable[[str, str], Awaitable[bytes]], count: Callable[[str], None]
) -> ImageSources:
    """Return the allowed sources of images; ConfigError if the folder does not exist.

    `stored` and `count` are as in `ImageSources`.
    """
    from candle_vllm.core.vision.fetching import ImageSources
    from candle_vllm.openai.fair_threads import asker

    domains = [host.strip() for given in settings.allowed_media_domains for host in given.split(",")]
    return ImageSources(domains, settings.allowed_local_media_path, stored, count, asker.get)


def engine_config(settings: table.ModelOptions, *, fetch: bool = True, **changes: Any) -> EngineConfig:
    """Return the engine's configuration; settings without a value keep the defaults of `EngineConfig`.

    `fetch` is as in `model_source`; `changes` are fields that replace the settings' values.
    """
    from candle_vllm.core import EngineConfig

    model, weight_file = model_source(settings, fetch=fetch, offline=bool(changes.get("offline")))
    if settings.revision is not None and os.path.exists(os.path.expanduser(model)):
        raise UsageError(f"--revision chooses a version on Hugging Face, but the model is {model}: leave it out")
    options = [table.BY_NAME[field.name] for field in dataclasses.fields(settings)]
    values = {option.engine: getattr(settings, option.name) for option in options if option.engine is not None}
    values |= {"weight_file": weight_file, "chat_template": _template(settings.chat_template)}
    in_ranks = settings.device == "cpu" and (settings.tensor_parallel_size or 1) > 1  # processes that need torch
    if settings.op_by_op and not in_ranks and importlib.util.find_spec("torch") is None:
        logger.warning("op_by_op has no effect: torch is not installed, so the compiled kernels compute")
        values["op_by_op"] = False
    draft = settings.speculative_config
    if draft is not None and isinstance(draft.get("model"), str):
        values["speculative_config"] = {**draft, "model": named_model(draft["model"])}
    if settings.mem is not None:
        values["kv_cache_memory"] = settings.mem << 20
    values |= changes
    return EngineConfig(model=model, **{name: value for name, value in values.items() if value is not None})


def load_engine(settings: table.ModelOptions, **changes: Any) -> InferenceEngine:
    """Load the model; `changes` replace fields of `EngineConfig`."""
    from candle_vllm.core.progress import Progress, heard_by

    latest = Progress("importing the engine")

    def hear(progress: Progress) -> None:
        nonlocal latest
        latest = progress

    with leaving_at_once(lambda: f"the model loaded ({latest})"), heard_by(hear):
        from candle_vllm.core import InferenceEngine

        refuse_wrong_formats(settings)

        with told_in_flags():
            return InferenceEngine(engine_config(settings, **changes))


_ADVICE = re.compile(r"`([a-z_][a-z0-9_]*)`|\b([a-z_][a-z0-9_]*)=('[^']{0,60}'|[\w.]{0,60}\w)(?: \(bytes\))?", re.ASCII)


def in_flags(text: str) -> str:
    """Rewrite names of engine settings in a message as flags: `kv_cache_memory=1048576` becomes `--mem 1`."""
    flags = {option.engine or option.name: option for option in table.OPTIONS}

    def flag(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        value = (match[3] or "").strip("'")
        if name not in flags or name not in SETTINGS:
            return match[0]
        if name == "kv_cache_memory":
            return f"--mem {-(-int(value) // MIB)}" if value.isdigit() else "--mem"
        option = flags[name]
        constant = next((word for word, means in option.constants.items() if str(means) == (value or "True")), None)
        word = max(option.flags, key=lambda word: word == "--" + option.name.replace("_", "-"), default="")
        return f"{word} {value}".strip() if word else constant or match[0]

    return _ADVICE.sub(flag, text)


@contextmanager
def told_in_flags() -> Iterator[None]:
    """Context manager that rewrites names of engine settings in errors as flags."""
    try:
        yield
    except CandleVllmError as error:
        speak_in_flags(error)
        raise


def speak_in_flags(error: CandleVllmError) -> None:
    """Rewrite names of engine settings in an error's message as flags."""
    error.args = (in_flags(str(error)), *error.args[1:])


def _template(path: Path | str | None) -> str | None:
    """Return a template: a file's content, a text as it is, or ChatML for llama.cpp's name `chatml`."""
    if path is None or isinstance(path, str):
        return path
    if path.name == "chatml" and not path.exists():
        return CHATML
    text = read_text(path, "the chat template")
    if len(text) > MAX_TEMPLATE:
        raise UsageError(f"the chat template {path} has more than {MAX_TEMPLATE} characters")
    return text


def store_options(settings: table.StorageOptions) -> StoreOptions | None:
    """Return the options of the response store, or None if it is off; errors do not repeat a URL with a password."""
    url = settings.responses_store
    if url == OFF:
        return None
    if url not in (MEMORY, SQLITE) and not url.startswith(tuple(BACKENDS)):
        raise UsageError(f"responses_store must be {', '.join((MEMORY, SQLITE, *URLS))} or {OFF}")
    return StoreOptions(
        url=RESPONSES_FILE if url == SQLITE else url,
        retention_days=settings.responses_retention_days,
        max_records=settings.responses_max_records,
        max_bytes=settings.responses_max_mb << 20,
    )


def mailbox_options(
    settings: table.StorageOptions,
    section: Mapping[str, Any] | None,
    variables: Mapping[str, str],
    *,
    given: Collection[str],
    home: Path,
) -> MailboxOptions | None:
    """Return the options of the mailbox, or None without a mailbox; `section` is `mailbox` of models.yaml, or None.

    Args:
        variables: values for `${NAME}` in secrets.
        given: names of the settings that are set explicitly.
        home: the home folder; the database of `--mailbox sqlite` is `MAILBOX_FILE` in it.

    Raises UsageError if a value is invalid, or a setting needs a mailbox that is off.
    """
    section = {} if section is None else section
    known_keys(section, _KEYS, "mailbox")
    url = settings.mailbox or section.get("url")
    if url is None:
        wanted = [name for name in given if name.startswith(("mailbox_", "webhook_"))] or list(section)
        if wanted:
            raise UsageError(f"{wanted[0]} needs a mailbox: set --mailbox, or url in the mailbox section")
        return None
    if not isinstance(url, str) or not (url == SQLITE or url.startswith(tuple(BACKENDS))):
        raise UsageError(f"mailbox must be {SQLITE}, {' or '.join(URLS)}")
    from candle_vllm.server.mailbox.options import MailboxOptions, webhook_options

    values: dict[str, Any] = {name: section[name] for name in (*_NUMBERS, "webhook_allow_private") if name in section}
    for name in _LISTS:
        if name in section:
            if not isinstance(section[name], list) or not all(isinstance(item, str) for item in section[name]):
                raise UsageError(f"mailbox: {name} must be a list of texts")
            values[name] = tuple(section[name])
    if "webhook" in section:
        values["webhook"] = webhook_options(section["webhook"], variables)
    for name in _FROM_SETTINGS:
        if name in given:
            values[name.removeprefix("mailbox_")] = getattr(settings, name)
    if not isinstance(values.get("webhook_allow_private", False), bool):
        raise UsageError("mailbox: webhook_allow_private must be true or false")
    return MailboxOptions(url=f"sqlite:///{home / MAILBOX_FILE}" if url == SQLITE else url, **values)
