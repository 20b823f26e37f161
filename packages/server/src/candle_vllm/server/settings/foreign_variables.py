# SPDX-License-Identifier: MIT
"""Environment variables of other deployments: their meaning here, or the reason why they have no effect.

Read before step 1 of a request's life. Names such as PORT are used by many programs: `CANDLE_VLLM_*` precedes them,
they are read only from the process's environment, and values that cannot be meant for this server are ignored. A name
that looks like an API key but is not one of this server's causes a warning, so that a typo leaves no server open.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.core.targets import ip_address, is_loopback
from candle_vllm.server.settings.commands import COMMANDS
from candle_vllm.server.settings.options import ENV_PREFIX, HTTP, UsageError, convert
from candle_vllm.server.settings.sources import SettingsSource
from candle_vllm.server.settings.table import BY_NAME, AccessOptions

_ROWS = foreign_tables()["Variables"]
DEPLOYMENTS: Mapping[str, str] = {name: setting for name, setting, _ in _ROWS if setting}
"""Variable -> setting; the first variable that is set decides. MODEL_NAME beside MODEL_ID is the served name."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables with the Hugging Face token, also in `.env`."""

IDLE: Mapping[str, str] = {name: why for name, _, why in _ROWS if why and not name.startswith(ENV_PREFIX)}
"""Variables of vLLM and the Rust candle-vllm that have no effect here -> the reason."""

_AS_DEFAULT = {"LLAMA_ARG_CTX_SIZE": "0", "LLAMA_ARG_N_PARALLEL": "-1", "LLAMA_ARG_THREADS": "-1",
               "VLLM_CPU_KVCACHE_SPACE": "0"}  # fmt: skip
"""Values that mean the default, as if the variable was not set."""
_LORA = ("MAX_LORAS", "MAX_LORA_RANK", "MAX_CPU_LORAS")  # each of them enables adapters
_OTHERS = ("HF_HUB_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "RUST_LOG")  # for every command, not only for servers
_KEY_LIKE = re.compile(
    r"(?:(?:CANDLE(?:_?VLLM)?|VLLM|LLM|LLAMA|LOCALAI|OLLAMA|SGLANG|APHRODITE|TGI|MODEL|ENGINE|INFERENCE|SERVER|SERVICE|"
    r"SERVE|APP|AUTH|ACCESS|BEARER|X)_?)?(?:API_?(?:KEYS?|TOKENS?|SECRET)|AUTH_?(?:KEY|TOKEN)|ACCESS_?(?:KEY|TOKEN)|"
    r"BEARER_?TOKEN|TOKEN|KEY)",
    re.ASCII,
)
_CLIENTS_KEY = "OPENAI_API_KEY"  # a client's variable: warn only if other machines can connect
_LEVELS = {"off": "error", "critical": "error", "error": "error", "warning": "warning", "warn": "warning",
           "info": "info", "debug": "debug", "trace": "debug"}  # fmt: skip


def deployment_source(
    environ: Mapping[str, str], stronger: Mapping[str, Any], command: str, *, keyed: bool
) -> SettingsSource:
    """Read the settings from variables of other deployments; UsageError if one for this program has an invalid value.

    Args:
        environ: environment of the process. Empty variables are ignored, with a remark if they are for an API key.
        stronger: settings from sources with higher precedence.
        command: only servers read variables of servers; `ps` reads the ones that locate a server.
        keyed: whether another source sets an API key.
    """
    takes, values = COMMANDS[command], dict[str, Any]()
    given_as: dict[str, str] = {}
    remarks = idle_remarks(environ, "the environment")
    for name, setting in DEPLOYMENTS.items():
        text = environ.get(name, "")
        locates = setting in takes.plus and BY_NAME[setting].group == HTTP
        if name not in environ or not (takes.serves_models or locates or name in _OTHERS):
            continue
        if text.strip() == _AS_DEFAULT.get(name) or (name == "CACHE_DIR" and "MODEL_ID" not in environ):
            continue  # other programs use the name CACHE_DIR, too
        if not text.strip():
            remarks += [f"{name} in the environment is empty and is not used as a key"] if setting == "api_key" else []
        elif setting not in values:
            value = _value(name, setting, text, remarks)
            if value is not None:
                values[setting], given_as[setting] = value, name
        elif name == "MODEL_NAME":
            values["served_model_name"], given_as["served_model_name"] = (text,), name
        elif setting == "api_key" and values[setting] != (text,):
            remarks.append(f"{name} in the environment is not used: {given_as[setting]} sets the key")
    if any(name in given_as.values() for name in _LORA) and stronger.get("enable_lora") is not False:
        values["enable_lora"], given_as["enable_lora"] = True, next(n for n in _LORA if n in given_as.values())
    if stronger.get("enable_lora") is False:
        values = {key: value for key, value in values.items() if given_as[key] not in _LORA}
    if any(name in stronger for name in ("model", "weight_path", "weight_file")):
        values = {key: value for key, value in values.items() if key not in ("model", "served_model_name")}
    source = SettingsSource("the environment", values, given_as, tuple(remarks) if takes.serves_models else ())
    host = values.get("host", "localhost")
    if keyed or "api_key" in values or "host" in stronger or is_loopback(host):
        return source
    name = given_as["host"]
    remark = f"{name} in the environment ({host}) is not used without an API key: set one, or --host {host}"
    del values["host"]
    return replace(source, remarks=(*source.remarks, remark))


def _value(name: str, setting: str, text: str, remarks: list[str]) -> Any:
    spelled = f"{name} in the environment"
    if setting == "host":
        return (
            text if text == "localhost" or ip_address(text) is not None else None
        )  # some shells set HOST to the name of the machine
    if setting == "log_level":
        return _log_level(text)
    if name == "HF_HOME":
        return convert(BY_NAME[setting].kind, text, spelled) / "hub"
    try:
        gib = "G" if name == "VLLM_CPU_KVCACHE_SPACE" else ""
        value = convert(BY_NAME[setting].kind, text + gib, spelled)
        if setting == "api_key":  # a single key, which may contain commas; llama.cpp's variable may have several
            keys = list(filter(None, value.split(","))) or [""] if name == "LLAMA_API_KEY" else [value]
            return tuple(convert(BY_NAME[setting].kind, key, spelled) for key in keys)
        return value
    except UsageError as error:
        if name not in ("PORT", "HF_HUB_OFFLINE"):
            raise
        remarks.append(f"{error}: it is not used")  # other programs use this name, too
        return None


def dotenv_remarks(dotenv: Mapping[str, str]) -> list[str]:
    """Return remarks on variables without our prefix in `.env`."""
    remarks = idle_remarks(dotenv, ".env")
    if "RUST_LOG" in dotenv:
        remarks.append("RUST_LOG is read from the environment only, not from .env: use CANDLE_VLLM_LOG_LEVEL there")
    return remarks


def idle_remarks(variables: Mapping[str, str], title: str) -> list[str]:
    """Return remarks on variables in `IDLE`, and on those of llama-server that are not in `DEPLOYMENTS`."""
    llama = (name for name in variables if name.startswith("LLAMA_ARG_") and name not in DEPLOYMENTS)
    known = {**IDLE, **dict.fromkeys(llama, "llama-server's flags are read, but few of its variables")}
    return [f"{name} in {title} has no effect: {why}" for name, why in known.items() if name in variables]


def hub_token_source(*places: tuple[str, Mapping[str, str]]) -> SettingsSource:
    """Read the token from huggingface_hub's variables, from the first place that has one."""
    for title, variables in places:
        for name in HUB_TOKENS:
            if variables.get(name):
                return SettingsSource(title, {"hf_token": variables[name]}, {"hf_token": name})
    return SettingsSource("nowhere")


def _log_level(text: str) -> str | None:
    """Translate RUST_LOG or a level to a log level: that of this program's directive, or the global one."""
    levels: dict[str, str] = {}
    for directive in text.lower().split(","):
        target, equals, level = directive.strip().rpartition("=")
        if level in _LEVELS and (not equals or target.replace("-", "_").startswith("candle_vllm")):
            whose, means = target and "own", _LEVELS[level]  # the most verbose level of several modules
            levels[whose] = min(means, levels.get(whose, means), key=("debug", "info", "warning", "error").index)
    return levels.get("own", levels.get(""))


def key_remarks(settings: AccessOptions, environ: Mapping[str, str], dotenv: Mapping[str, str]) -> Iterator[str]:
    """Yield warnings of names that look like an API key, if the server has no key."""
    if settings.has_api_keys:
        return
    for title, variables in (("the environment", environ), (".env", dotenv)):
        for name, text in variables.items():
            plain = name.upper().replace("-", "_")
            looks = _KEY_LIKE.fullmatch(plain) or (not settings.is_local and plain == _CLIENTS_KEY)
            if looks and text.strip() and not (variables is environ and name in DEPLOYMENTS):
                yield f"{name:.80} in {title} is not the server's API key, and none is set: use {ENV_PREFIX}API_KEY"
