"""Settings: every setting of the server and the commands in one frozen object.

Made before step 1 of a request's life. Precedence: command line > environment > `.env` > models.yaml > the default
below. The names, flags and ranges stand in `flags.py`; a field whose default is None leaves the choice to the
engine, the model or the machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from candle_vllm.server.settings.address import Address, parse_address
from candle_vllm.server.settings.kinds import UsageError
from candle_vllm.server.settings.table import BY_NAME, OPTIONS, SAMPLING


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
            option = BY_NAME[item.name]
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
