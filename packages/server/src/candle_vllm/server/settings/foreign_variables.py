# SPDX-License-Identifier: MIT
"""Environment variables of other deployments: what each means here, or that it means nothing.

Read before step 1 of a request's life. Names such as PORT are everybody's: they stand below `CANDLE_VLLM_*`, count in
the process's environment alone, and are passed over where they can hardly be meant for us. A name that looks like an
API key but is none of this server's is warned of, so that nobody's server stands open by a spelling.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.server.settings.options import ENV_PREFIX, UsageError, convert
from candle_vllm.server.settings.sources import SettingsSource
from candle_vllm.server.settings.table import BY_NAME, Settings

_ROWS = foreign_tables()["Variables"]
DEPLOYMENTS: Mapping[str, str] = {name: setting for name, setting, _ in _ROWS if setting}
"""The setting of each variable; of two for one setting, the first that is given counts. MODEL_NAME beside MODEL_ID is
the served name."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables with the Hugging Face token, which may stand in `.env` too."""

IDLE: Mapping[str, str] = {name: why for name, _, why in _ROWS if why and not name.startswith(ENV_PREFIX)}
"""Variables of candle-vllm without its prefix that change nothing, and why."""

SERVING = frozenset({"serve", "config"})
"""The commands that names of servers are for."""
_WHERE = {"ps": ("HOST", "PORT", "VLLM_API_KEY", "API_KEY")}
_LORA = ("MAX_LORAS", "MAX_LORA_RANK", "MAX_CPU_LORAS")  # of a service that always takes adapters
_OTHERS = ("HF_HUB_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "RUST_LOG")  # of programs, and so for every command
_KEY_LIKE = re.compile(
    r"(?:(?:CANDLE(?:_?VLLM)?|VLLM|LLM|LLAMA|LOCALAI|OLLAMA|SGLANG|APHRODITE|TGI|MODEL|ENGINE|INFERENCE|SERVER|SERVICE|"
    r"SERVE|APP|AUTH|ACCESS|BEARER|X)_?)?(?:API_?(?:KEYS?|TOKENS?|SECRET)|AUTH_?(?:KEY|TOKEN)|ACCESS_?(?:KEY|TOKEN)|"
    r"BEARER_?TOKEN|TOKEN|KEY)",
    re.ASCII,
)
_CLIENTS_KEY = "OPENAI_API_KEY"  # a client's, and on many machines: a reason to warn only where others reach the server
_LEVELS = {"off": "error", "error": "error", "warn": "warning", "info": "info", "debug": "debug", "trace": "debug"}


def deployment_source(
    environ: Mapping[str, str], stronger: Mapping[str, Any], command: str, *, keyed: bool
) -> SettingsSource:
    """What the names of other deployments give.

    Args:
        environ: the process's environment. An empty variable gives nothing, but for a key is remarked upon.
        stronger: the settings that are given by what stands above.
        command: names of servers count for those that serve alone, and where to look for one for `ps`.
        keyed: whether an API key is given elsewhere.

    Raises:
        UsageError: a value that is meant for this program is invalid.
    """
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    remarks = idle_remarks(environ, "the environment")
    for name, setting in DEPLOYMENTS.items():
        text = environ.get(name, "")
        if name not in environ or not (command in SERVING or name in (*_OTHERS, *_WHERE.get(command, ()))):
            continue
        if name == "CACHE_DIR" and "MODEL_ID" not in environ:
            continue  # of any program
        if not text.strip():
            remarks += [f"{name} in the environment is empty, and no key"] if setting == "api_key" else []
        elif setting not in values:
            value = _value(name, setting, text, remarks)
            if value is not None:
                values[setting], given_as[setting] = value, name
        elif name == "MODEL_NAME":
            values["served_model_name"], given_as["served_model_name"] = (text,), name
        elif setting == "api_key" and values[setting] != (text,):
            remarks.append(f"{name} in the environment is not used: {given_as[setting]} is the key")
    if any(name in given_as.values() for name in _LORA) and stronger.get("enable_lora") is not False:
        values["enable_lora"], given_as["enable_lora"] = True, next(n for n in _LORA if n in given_as.values())
    if stronger.get("enable_lora") is False:
        values = {key: value for key, value in values.items() if given_as[key] not in _LORA}
    if any(name in stronger for name in ("model", "weight_path", "weight_file")):
        values = {key: value for key, value in values.items() if key not in ("model", "served_model_name")}
    source = SettingsSource("the environment", values, given_as, tuple(remarks) if command in SERVING else ())
    host = values.get("host", "localhost")
    if keyed or "api_key" in values or "host" in stronger or is_loopback(host):
        return source
    remark = f"HOST in the environment ({host}) is not used, for the server has no API key: set one, or --host {host}"
    del values["host"]
    return replace(source, remarks=(*source.remarks, remark))


def _value(name: str, setting: str, text: str, remarks: list[str]) -> Any:
    spelled = f"{name} in the environment"
    if setting == "host":
        return text if _is_address(text) else None  # shells say there what machine this is
    if setting == "log_level":
        return _rust_level(text)
    if name == "HF_HOME":
        return convert(BY_NAME[setting].kind, text, spelled) / "hub"
    try:
        value = convert(BY_NAME[setting].kind, text, spelled)
        return (value,) if setting == "api_key" else value  # one key, commas and all
    except UsageError as error:
        if name not in ("PORT", "HF_HUB_OFFLINE"):
            raise
        remarks.append(f"{error}: it is not used")  # what others mean by it, too
        return None


def dotenv_remarks(dotenv: Mapping[str, str]) -> list[str]:
    """What is said of names without our prefix in `.env`."""
    remarks = idle_remarks(dotenv, ".env")
    if "RUST_LOG" in dotenv:
        remarks.append("RUST_LOG in .env is not read, but in the environment: here it is CANDLE_VLLM_LOG_LEVEL")
    return remarks


def idle_remarks(variables: Mapping[str, str], title: str) -> list[str]:
    """What is said of candle-vllm's variables without its prefix that change nothing."""
    return [f"{name} in {title} has no effect: {why}" for name, why in IDLE.items() if name in variables]


def hub_token_source(*places: tuple[str, Mapping[str, str]]) -> SettingsSource:
    """The Hugging Face token of the variables that its own programs read, from the first place that has one."""
    for title, variables in places:
        for name in HUB_TOKENS:
            if variables.get(name):
                return SettingsSource(title, {"hf_token": variables[name]}, {"hf_token": name})
    return SettingsSource("nowhere")


def _is_address(text: str) -> bool:
    if text == "localhost":
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _rust_level(text: str) -> str | None:
    """The level that RUST_LOG means for this program: that of its own directive, else that of all."""
    levels: dict[str, str] = {}
    for directive in text.lower().split(","):
        target, equals, level = directive.strip().rpartition("=")
        if level in _LEVELS and (not equals or target.replace("-", "_").startswith("candle_vllm")):
            whose, means = target and "own", _LEVELS[level]  # of several of our modules, the one that says most
            levels[whose] = min(means, levels.get(whose, means), key=("debug", "info", "warning", "error").index)
    return levels.get("own", levels.get(""))


def is_loopback(host: str) -> bool:
    """Whether an address of `--host` reaches no further than this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_remarks(settings: Settings, environ: Mapping[str, str], dotenv: Mapping[str, str]) -> Iterator[str]:
    """Warn of names that look like an API key if the server has no key."""
    if settings.has_api_keys:
        return
    address = settings.address
    reached = address.unix_path is None and not is_loopback(address.host)
    for title, variables in (("the environment", environ), (".env", dotenv)):
        for name, text in variables.items():
            plain = name.upper().replace("-", "_")
            looks = _KEY_LIKE.fullmatch(plain) or (reached and plain == _CLIENTS_KEY)
            if looks and text.strip() and not (variables is environ and name in DEPLOYMENTS):
                yield f"{name:.80} in {title} is no API key of this server, which has none: {ENV_PREFIX}API_KEY is"
