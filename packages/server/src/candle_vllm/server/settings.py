"""Settings: every setting of the server and the commands in one frozen object.

Made before step 1 of a request's life. Precedence: command line > environment > `.env` > models.yaml > the default
below. The names, flags and ranges stand in `flags.py`; a field whose default is None leaves the choice to the
engine, the model or the machine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candle_vllm.server.flags import OPTIONS, SAMPLING
from candle_vllm.server.kinds import Integer, UsageError
from candle_vllm.server.sources import Source

_OPTIONS = {option.name: option for option in OPTIONS}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `docs/configuration.md` lists; each field is checked when the object is made (UsageError)."""

    model: str | None = None
    weight_path: Path | None = None
    weight_file: str | None = None
    revision: str | None = None
    tokenizer: Path | None = None
    chat_template: Path | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    served_model_name: tuple[str, ...] = ()
    models_config: Path | None = None
    hf_token: str | None = field(default=None, repr=False)
    hf_token_path: Path | None = None
    download_dir: Path | None = None
    offline: bool = False
    isq: str | None = None
    load_format: str | None = None
    device: str | None = None
    dtype: str | None = None
    enforce_eager: bool = False
    attention_backend: str | None = None
    kv_cache_dtype: str | None = None
    cuda_graphs: bool | None = None
    max_cudagraph_capture_size: int | None = None
    deterministic: bool = False
    mem: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_fraction: float | None = None
    block_size: int | None = None
    engine_process: bool = False
    threads: int | None = None
    max_model_len: int | None = None
    yarn_scaling_factor: float | None = None
    max_num_seqs: int | None = None
    prefill_chunk_size: int | None = None
    enable_prefix_caching: bool | None = None
    max_queued_requests: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_loaded_models: int | None = None
    idle_unload_secs: int | None = None
    queue_size: int = 256
    model_wait_timeout: int = 600
    model_drain_timeout: int = 120
    mailbox: str | None = field(default=None, repr=False)
    mailbox_retention_secs: int = 3600
    webhook_allowed_hosts: tuple[str, ...] = ()
    webhook_allow_private: bool = False
    responses_store: str = field(default="memory", repr=False)
    responses_retention_days: int = 30
    responses_max_records: int = 10_000
    responses_max_mb: int = 256
    mcp_config: Path | None = None
    mcp_command: str | None = None
    mcp_args: str | None = field(default=None, repr=False)
    mcp_execute: bool = False
    mcp_max_turns: int = 8
    mcp_max_tool_calls: int = 32
    mcp_tool_timeout: float | None = None
    mcp_allow_urls: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 2000
    ui_server: bool = False
    api_key: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    management_key: tuple[str, ...] = field(default=(), repr=False)
    max_queued_per_key: int | None = None
    request_timeout: int = 3600
    cors_origin: tuple[str, ...] = ()
    max_body_mb: int = 8
    enable_request_priority: bool = False
    trust_request_chat_template: bool = False
    shutdown_timeout: int = 30
    log_requests: bool = False
    log_prompts: bool = False
    log_format: str = "text"
    otlp_endpoint: str | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            option = _OPTIONS[item.name]
            if value is None or value == item.default:
                continue
            try:
                for single in value if option.repeat else (value,):
                    option.kind.check(single)
            except ValueError as error:
                raise UsageError(f"{item.name} {error}") from None
        if self.log_prompts and not self.log_requests:
            raise UsageError("log_prompts adds to the request log, which is off: set log_requests as well")
        parse_address(self.host, self.port)

    @property
    def address(self) -> Address:
        """Where to listen: `host` and `port` together."""
        return parse_address(self.host, self.port)

    @property
    def default_sampling(self) -> dict[str, float | int]:
        """The sampling settings that were given, by their request names."""
        names = [option.name for option in OPTIONS if option.group == SAMPLING]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Address:
    """A TCP address, or the path of a Unix socket."""

    host: str
    port: int
    unix_path: Path | None = None

    @property
    def url(self) -> str:
        """The address for people; a server that listens everywhere is reached at 127.0.0.1."""
        if self.unix_path is not None:
            return f"unix://{self.unix_path}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def parse_address(host: str, port: int) -> Address:
    """Reads the forms of `--host`; a port inside `host` wins over `port`."""
    if host.startswith("unix://"):
        path = Path(host.removeprefix("unix://"))
        if not path.is_absolute() or len(str(path).encode()) > 100:
            raise UsageError(f"host {host!r} must be unix:///absolute/path of at most 100 bytes")
        return Address("", 0, path)
    name, inner = split_host(host)
    return Address(name, port if inner is None else inner)


def split_host(host: str) -> tuple[str, int | None]:
    """Host name or address, and the port that stands in it, if any."""
    match = re.fullmatch(r"(?:(?P<scheme>[a-z]+)://)?(?P<rest>[^/]+)/?", host)
    if match is None or match["scheme"] not in (None, "tcp", "http"):
        hint = ": HTTPS needs a reverse proxy in front" if host.startswith("https:") else ""
        raise UsageError(f"host {host!r} is none of host, host:port, [v6]:port, tcp://, http://, unix:///path{hint}")
    rest = match["rest"]
    if re.fullmatch(r"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*(%\w+)?", rest):
        return rest, None  # an IPv6 address without brackets
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+(?:%\w+)?)\]|(?P<name>[\w.-]+))(?::(?P<port>.*))?", rest, re.ASCII)
    if match is None:
        raise UsageError(f"host {host!r} is none of host, host:port, [v6]:port, tcp://, http://, unix:///path")
    name = match["v6"] or match["name"]
    if match["port"] is None:
        return name, None
    try:
        return name, Integer(0, 65535, units=False).from_text(match["port"])
    except ValueError as error:
        raise UsageError(f"the port in host {host!r} {error}") from None


def merge(sources: Sequence[Source]) -> dict[str, Any]:
    """One value per setting, from the first source that has it; of rival settings, only the first source's."""
    return {name: source.values[name] for name, source in origins(sources).items()}


def origins(sources: Sequence[Source]) -> dict[str, Source]:
    """The source that decides on each setting that anybody gives."""
    deciding: dict[str, Source] = {}
    taken: set[str] = set()
    for source in sources:
        rivals: dict[str, str] = {}
        for name in source.values:
            group = _OPTIONS[name].rivals or name
            if group in rivals:
                spelled = [source.given_as.get(each, each) for each in (rivals[group], name)]
                raise UsageError(f"{spelled[0]} and {spelled[1]} both set the {group}: give one ({source.title})")
            rivals[group] = name
            if group not in taken:
                deciding[name] = source
        taken.update(rivals)
    return deciding


def settle_port(merged: dict[str, Any], sources: Sequence[Source]) -> None:
    """Of a port inside `host` and a `port`, the one from the stronger source counts."""
    if "host" not in merged or "port" not in merged or merged["host"].startswith("unix:"):
        return
    name, inner = split_host(merged["host"])
    if inner is None or inner == merged["port"]:
        return
    rank = {key: next(i for i, source in enumerate(sources) if key in source.values) for key in ("host", "port")}
    if rank["host"] == rank["port"]:
        raise UsageError(f"host {merged['host']!r} and port {merged['port']} name two ports: give one")
    if rank["port"] < rank["host"]:
        merged["host"] = f"[{name}]" if ":" in name else name


def token(merged: Mapping[str, Any], variables: Mapping[str, str], folder: Path) -> str | None:
    """The Hugging Face token: itself, by the name of a variable, from a file, or from HF_TOKEN."""
    if merged.get("hf_token_path") is not None:
        path = folder / merged["hf_token_path"]
        try:
            token = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"cannot read the Hugging Face token from {path}") from None
        if not token:
            raise UsageError(f"the Hugging Face token file {path} is empty")
        return token
    given = merged.get("hf_token")
    if given is None:
        return variables.get("HF_TOKEN") or None
    if given.startswith("hf_"):
        return given
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", given):
        raise UsageError("--hf-token must be a token that begins with hf_, or the name of an environment variable")
    if not variables.get(given):
        raise UsageError(f"--hf-token names the environment variable {given}, which is not set")
    return variables[given]
