"""The one table of settings: flags, environment variables, models.yaml keys and help all come from it.

Read before step 1 of a request's life. A setting called `block_size` is the field `Settings.block_size`, the
variable `CANDLE_VLLM_BLOCK_SIZE` and, where `in_yaml`, a key of `params` in models.yaml. The short names with two
dashes (`--m`, `--p`) are candle-vllm's; the long ones are those that users of other servers know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from candle_vllm.core.config import ISQ_NAMES
from candle_vllm.responses.store.options import MAX_DAYS, MAX_MB, MAX_RECORDS
from candle_vllm.server.settings.kinds import (
    Boolean,
    Choice,
    Device,
    FilePath,
    FreeText,
    Integer,
    Kind,
    Number,
    Secret,
    Text,
)

ENV_PREFIX = "CANDLE_VLLM_"
COMMANDS = {
    "serve": "serve the model over HTTP (what happens without a command)",
    "generate": "continue one prompt on the terminal",
    "chat": "talk with the model on the terminal",
    "agent": "carry out one request with the tools of MCP servers",
    "bench": "measure the model on this machine",
    "quantize": "write the model as a GGUF file, quantised or plain",
    "config": "show every setting, and where its value comes from",
}
MODEL, DEVICE, LIMITS, SAMPLING, MODELS, MAILBOX, RESPONSES, TOOLS, HTTP, LOGGING = (
    "model", "device and memory", "scheduling", "default sampling", "several models", "mailbox and webhooks",
    "kept responses", "MCP tools", "HTTP server", "logging",
)  # fmt: skip
GROUPS = (MODEL, DEVICE, LIMITS, SAMPLING, MODELS, MAILBOX, RESPONSES, TOOLS, HTTP, LOGGING)
COMMAND_GROUPS: Mapping[str, tuple[str, ...]] = {
    "serve": GROUPS,
    "generate": (MODEL, DEVICE, LIMITS, SAMPLING, LOGGING),
    "chat": (MODEL, DEVICE, LIMITS, SAMPLING, LOGGING),
    "agent": (MODEL, DEVICE, LIMITS, SAMPLING, TOOLS, LOGGING),
    "bench": (MODEL, DEVICE, LIMITS, LOGGING),
    "quantize": (MODEL, LOGGING),
    "config": GROUPS,
}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: field of `Settings`; upper-cased after `CANDLE_VLLM_`, the environment variable.
        group: heading in the help.
        flags: flags that take a value, in the order of the help.
        kind: how its values are read and checked.
        help: what it does, for `--help`.
        metavar: what stands for the value in the help.
        constants: flags without a value, and the value that each means.
        repeat: the flag may be given several times; in the environment, values are separated by commas.
        in_yaml: may stand among `params` of a model in models.yaml.
        rivals: name of the set of settings of which one source may give only one.
        commands: those that the setting acts on, among those that have its group; the others do not know its flags.
    """

    name: str
    group: str
    flags: tuple[str, ...]
    kind: Kind
    help: str
    metavar: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    repeat: bool = False
    in_yaml: bool = False
    rivals: str | None = None
    commands: tuple[str, ...] = tuple(COMMANDS)

    @property
    def env(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.upper()


def _switch(name: str, group: str, text: str, off: tuple[str, ...] = (), **more: Any) -> Option:
    flag = "--" + name.replace("_", "-")
    constants = {flag: True, **dict.fromkeys(off or (f"--no-{flag[2:]}",), False)}
    return Option(name, group, (), Boolean(), text, constants=constants, **more)


_SERVE = ("serve", "config")  # bench sizes the batch itself, and one conversation has no batch
_WITH_TEXT = ("serve", "generate", "chat", "agent", "config")  # bench has no text, and always takes the likeliest token
_LOADING = tuple(command for command in COMMANDS if command != "quantize")
_REUSING = ("serve", "chat", "agent", "config")  # those with requests that begin alike
_CALLING = ("serve", "agent", "config")  # those whose requests have tools
_TOKENS = Integer(1, 1 << 24)
_DTYPES = Choice(("auto", "f32", "bf16", "f16"), {"float32": "f32", "bfloat16": "bf16", "float16": "f16"})
_ATTENTION = Choice(("auto", "triton", "torch_flash", "flash_attn", "torch"), {"flash-attn": "flash_attn"})
_KV_DTYPES = Choice(("auto", "fp8"), {"fp8_e4m3": "fp8"})
_ISQ = Choice(ISQ_NAMES, {name[:-1] + "_k": name for name in ISQ_NAMES if name.endswith("k")})
_LEVELS = Choice(("debug", "info", "warning", "error"), {"warn": "warning"})

OPTIONS: tuple[Option, ...] = (
    Option("model", MODEL, ("--m", "--model"), Text(),
           "Hugging Face id, folder, .gguf file, or name in models.yaml; without it, the demo model", "MODEL",
           rivals="model source"),
    Option("weight_path", MODEL, ("--w", "--weight-path"), FilePath(), "folder with the model's files", "DIR",
           rivals="model source"),
    Option("weight_file", MODEL, ("--f", "--weight-file"), Text(),
           "weight file inside the model's folder or repository; alone, a .gguf file", "FILE"),
    Option("revision", MODEL, ("--revision",), Text(), "branch, tag or commit on Hugging Face", "REV", in_yaml=True),
    Option("tokenizer", MODEL, ("--tokenizer",), FilePath(), "folder with the tokenizer.json to use instead", "DIR",
           in_yaml=True),
    Option("chat_template", MODEL, ("--chat-template",), FilePath(), "file with the Jinja chat template to use instead",
           "FILE", in_yaml=True, commands=(*_WITH_TEXT, "quantize")),
    Option("tool_parser", MODEL, ("--tool-parser", "--tool-call-parser", "--enforce-parser"), Text(128),
           "format of the model's tool calls (docs/tool-calling.md); without it, chosen by the model's files", "NAME",
           in_yaml=True, commands=_CALLING),
    Option("reasoning_parser", MODEL, ("--reasoning-parser",), Text(128),
           "format of the model's reasoning; without it, chosen by the model's files", "NAME", in_yaml=True,
           commands=_WITH_TEXT),
    Option("served_model_name", MODEL, ("--served-model-name",), Text(512),
           "name of the model for clients; repeatable, the first is reported", "NAME", repeat=True, in_yaml=True,
           commands=_SERVE),
    Option("models_config", MODEL, ("--models-config",), FilePath(),
           "models.yaml; else ~/.candle-vllm/models.yaml, else ./models.yaml", "FILE"),
    Option("hf_token", MODEL, ("--hf-token",), Secret(),
           "name of the environment variable that holds the Hugging Face token, or the token itself (hf_...)",
           "NAME|TOKEN", rivals="Hugging Face token"),
    Option("hf_token_path", MODEL, ("--hf-token-path",), FilePath(), "file that holds the Hugging Face token", "FILE",
           rivals="Hugging Face token"),
    Option("download_dir", MODEL, ("--download-dir",), FilePath(), "where downloads are kept", "DIR", in_yaml=True),
    _switch("offline", MODEL, "never use the network to find the model"),
    Option("isq", MODEL, ("--isq",), _ISQ,
           "quantise plain weights while they are loaded (docs/quantisation.md): " + ", ".join(ISQ_NAMES), "TYPE",
           in_yaml=True),
    Option("load_format", MODEL, ("--load-format",), Choice(("auto", "dummy"), {}),
           "auto reads the weights; dummy fills them with random numbers, to measure a model without its files",
           "FORMAT", in_yaml=True, commands=_LOADING),
    Option("device", DEVICE, ("--d", "--device"), Device(),
           "auto, cpu, cuda, cuda:N, or N alone for a GPU; --cpu is --device cpu", "DEVICE",
           constants={"--cpu": "cpu"}, in_yaml=True),
    Option("dtype", DEVICE, ("--dtype",), _DTYPES,
           "type of plain matrices: auto (each one's own; on a GPU bf16, or f16 where it has none), f32, bf16 or f16",
           "TYPE", in_yaml=True),
    _switch("enforce_eager", DEVICE,
            "decode the weights and run the layers one by one, on a GPU without CUDA graphs: slow, for comparison",
            in_yaml=True),
    Option("attention_backend", DEVICE, ("--attention-backend",), _ATTENTION,
           "attention on a GPU: auto (triton), triton, torch_flash, flash_attn or torch", "NAME", in_yaml=True),
    Option("kv_cache_dtype", DEVICE, ("--kv-cache-dtype", "--kvcache-dtype"), _KV_DTYPES,
           "type of keys and values: auto (that of activations), or fp8 on a GPU, scaled as the checkpoint says, else "
           "by 1; --fp8-kvcache is fp8", "TYPE",
           constants={"--fp8-kvcache": "fp8"}, in_yaml=True),
    _switch("cuda_graphs", DEVICE, "capture decoding steps as CUDA graphs (on unless disabled)",
            off=("--disable-cuda-graph", "--no-cuda-graphs"), in_yaml=True),
    Option("max_cudagraph_capture_size", DEVICE, ("--max-cudagraph-capture-size",), Integer(0, 16384),
           "on a GPU, capture steps with prompts of up to so many tokens, too; 0 for none", "N", in_yaml=True),
    _switch("deterministic", DEVICE, "on a GPU, make seeded answers independent of what else is in the batch",
            in_yaml=True),
    Option("mem", DEVICE, ("--mem",), Integer(1, 1 << 30), "memory of the KV cache, in MB of 2^20 bytes", "MB",
           in_yaml=True, rivals="KV cache size"),
    Option("kv_cache_memory_bytes", DEVICE, ("--kv-cache-memory-bytes",), Integer(1 << 10, 1 << 50),
           "the same in bytes; 4G is 4 * 2^30", "BYTES", in_yaml=True, rivals="KV cache size"),
    Option("kv_fraction", DEVICE, ("--kv-fraction",), Number(0, 1, open_low=True, open_high=True),
           "share of the memory left after loading that the KV cache takes: 0.4 on the CPU, 0.9 on a GPU", "SHARE",
           in_yaml=True, rivals="KV cache size"),
    Option("block_size", DEVICE, ("--block-size",), Integer(1, 1024), "tokens in one KV block, a power of two", "N",
           in_yaml=True),
    _switch("engine_process", DEVICE,
            "run the engine in a process of its own, which is started again when it dies", in_yaml=True,
            commands=_SERVE),
    Option("threads", DEVICE, ("--threads",), Integer(1, 1024), "CPU threads; without it, one per physical core", "N",
           in_yaml=True),
    Option("max_model_len", LIMITS, ("--max-model-len",), _TOKENS, "longest prompt plus answer, in tokens", "N",
           in_yaml=True),
    Option("yarn_scaling_factor", LIMITS, ("--yarn-scaling-factor",), Number(1, 1024, open_low=True),
           "stretch the context of a model without rotary scaling by YaRN, to this many times its own", "FACTOR",
           in_yaml=True),
    Option("max_num_seqs", LIMITS, ("--max-num-seqs",), Integer(1, 4096),
           "most sequences in one step: 64 on the CPU, 256 on a GPU", "N", in_yaml=True, commands=_SERVE),
    Option("prefill_chunk_size", LIMITS, ("--prefill-chunk-size", "--max-num-batched-tokens"), Integer(1, 1 << 20),
           "most tokens in one step, prompts included: 512 on the CPU, 8192 on a GPU", "N", in_yaml=True),
    _switch("enable_prefix_caching", LIMITS, "reuse the KV blocks of equal prompt beginnings (on unless disabled)",
            off=("--disable-prefix-cache", "--no-enable-prefix-caching"), in_yaml=True, commands=_REUSING),
    Option("max_queued_requests", LIMITS, ("--max-queued-requests",), Integer(1, 1 << 20),
           "most unfinished sequences before new requests are refused with 503", "N", in_yaml=True, commands=_SERVE),
    Option("seed", LIMITS, ("--seed",), Integer(-(1 << 63), (1 << 64) - 1, units=False),
           "makes requests without a seed reproducible, in order of arrival", "N", in_yaml=True, commands=_WITH_TEXT),
    Option("temperature", SAMPLING, ("--temperature",), Number(0, 100), "0 is greedy", "X", in_yaml=True),
    Option("top_p", SAMPLING, ("--top-p",), Number(0, 1, open_low=True), "keep the likeliest tokens up to this sum",
           "X", in_yaml=True),
    Option("top_k", SAMPLING, ("--top-k",), Integer(-1, 1 << 24), "keep the K likeliest tokens; 0 or -1 keeps all", "K",
           in_yaml=True),
    Option("min_p", SAMPLING, ("--min-p",), Number(0, 1), "drop tokens less likely than this share of the likeliest",
           "X", in_yaml=True),
    Option("frequency_penalty", SAMPLING, ("--frequency-penalty",), Number(-2, 2), "penalty per earlier occurrence",
           "X", in_yaml=True),
    Option("presence_penalty", SAMPLING, ("--presence-penalty",), Number(-2, 2), "penalty for having occurred", "X",
           in_yaml=True),
    Option("max_loaded_models", MODELS, ("--max-loaded-models",), Integer(1, 1024),
           "most models in memory; without it, as many as fit", "N"),
    Option("idle_unload_secs", MODELS, ("--idle-unload-secs",), Integer(1, 1 << 24),
           "unload a model that was not used for so long; without it, models stay", "SECONDS"),
    Option("queue_size", MODELS, ("--queue-size",), Integer(1, 1 << 16),
           "requests that may wait for a model that is not loaded, for each model", "N"),
    Option("model_wait_timeout", MODELS, ("--model-wait-timeout",), Integer(1, 86400),
           "how long a request waits for a model that is not loaded", "SECONDS"),
    Option("model_drain_timeout", MODELS, ("--model-drain-timeout",), Integer(0, 86400),
           "how long a model that makes room for another may finish its requests", "SECONDS"),
    Option("mailbox", MAILBOX, ("--mailbox",), Secret(),
           "keep answers for clients that ask for it: sqlite (in ~/.candle-vllm), sqlite:///path or postgresql://...",
           "URL"),
    Option("mailbox_retention_secs", MAILBOX, ("--mailbox-retention-secs",), Integer(1, 30 * 86400),
           "how long a finished answer is kept", "SECONDS"),
    Option("webhook_allowed_hosts", MAILBOX, ("--webhook-allowed-hosts",), Text(512),
           "host to which clients may have answers pushed, or *.example.com; repeatable", "HOST", repeat=True),
    _switch("webhook_allow_private", MAILBOX, "hosts that are listed by name may have private addresses"),
    Option("responses_store", RESPONSES, ("--responses-store",), Secret(),
           "where responses and conversations are kept: memory (until the server ends), sqlite (in ~/.candle-vllm), "
           "sqlite:///path, postgresql://..., or off", "URL"),
    Option("responses_retention_days", RESPONSES, ("--responses-retention-days",), Integer(1, MAX_DAYS),
           "how long a response is kept", "DAYS"),
    Option("responses_max_records", RESPONSES, ("--responses-max-records",), Integer(1, MAX_RECORDS),
           "most responses and conversations of all keys; the oldest make room", "N"),
    Option("responses_max_mb", RESPONSES, ("--responses-max-mb",), Integer(1, MAX_MB),
           "most of what they hold, in MB of 2^20 bytes; the oldest make room", "MB"),
    Option("mcp_config", TOOLS, ("--mcp-config",), FilePath(),
           "file with the MCP servers (docs/mcp.md); without it ./mcp.json, where there is one", "FILE"),
    Option("mcp_command", TOOLS, ("--mcp-command",), Text(),
           "program of one more MCP server, which is called default", "PROGRAM", commands=_SERVE),
    Option("mcp_args", TOOLS, ("--mcp-args",), Text(),
           "its arguments, as in a shell, or separated by commas: --mcp-args=--port,80", "ARGS", commands=_SERVE),
    _switch("mcp_execute", TOOLS, "run the calls of tools that mcp.json approves in chat requests without tools",
            commands=_SERVE),
    Option("mcp_max_turns", TOOLS, ("--mcp-max-turns",), Integer(1, 1000),
           "most turns of the model in a chat request whose tools run here", "N", commands=_SERVE),
    Option("mcp_max_tool_calls", TOOLS, ("--mcp-max-tool-calls",), Integer(0, 10_000),
           "most calls of tools that run in one chat request", "N", commands=_SERVE),
    Option("mcp_tool_timeout", TOOLS, ("--mcp-tool-timeout",), Number(0, 3600, open_low=True),
           "most seconds for one call of a tool, where mcp.json allows more", "SECONDS", commands=_SERVE),
    Option("mcp_allow_urls", TOOLS, ("--mcp-allow-urls",), Text(2048),
           "MCP server that requests to /v1/responses may name: https://host/path, * for any characters; repeatable",
           "PATTERN", repeat=True, commands=_SERVE),
    Option("host", HTTP, ("--h", "--host"), Text(512),
           "address to listen on: host, host:port, [v6]:port, tcp://, http:// or unix:///path", "HOST"),
    Option("port", HTTP, ("--p", "--port"), Integer(0, 65535, units=False), "TCP port; 0 takes a free one", "PORT"),
    _switch("ui_server", HTTP, "serve the web UI at /", commands=_SERVE),
    Option("api_key", HTTP, ("--api-key",), Secret(),
           "key that clients must send as `Authorization: Bearer`; repeatable", "KEY", repeat=True),
    Option("api_key_file", HTTP, ("--api-key-file",), FilePath(), "file with one API key per line", "FILE"),
    Option("management_key", HTTP, ("--management-key",), Secret(),
           "key for loading and unloading models and for /metrics, where API keys shall not do; repeatable", "KEY",
           repeat=True),
    Option("max_queued_per_key", HTTP, ("--max-queued-per-key",), Integer(1, 1 << 20),
           "most unfinished sequences of one API key before its further requests are refused with 429", "N"),
    Option("request_timeout", HTTP, ("--request-timeout",), Integer(1, 1 << 20),
           "seconds after which a request is ended, waiting included", "SECONDS"),
    Option("cors_origin", HTTP, ("--cors-origin",), Text(512),
           "web origin whose pages may call this server, or *; repeatable", "ORIGIN", repeat=True),
    Option("max_body_mb", HTTP, ("--max-body-mb",), Integer(1, 1024), "largest request body, in MB of 2^20 bytes",
           "MB"),
    _switch("enable_request_priority", HTTP, "let clients put their requests before those of others (`priority`)"),
    _switch("trust_request_chat_template", HTTP, "let clients send a chat template of their own (`chat_template`)"),
    Option("shutdown_timeout", HTTP, ("--shutdown-timeout",), Integer(0, 86400),
           "seconds that running requests get to finish on shutdown", "SECONDS"),
    _switch("log_requests", LOGGING, "log one line per HTTP request and one per generation, without its content",
            commands=_SERVE),
    _switch("log_prompts", LOGGING,
            "write the beginning of prompts to the request log as well (needs --log-requests)", commands=_SERVE),
    Option("log_format", LOGGING, ("--log-format",), Choice(("text", "json"), {}),
           "text, or json: one object per line", "FORMAT", commands=_SERVE),
    Option("otlp_endpoint", LOGGING, ("--otlp-endpoint",), Text(2048),
           "OTLP/HTTP collector for traces, such as http://127.0.0.1:4318; needs candle-vllm-server[telemetry]", "URL",
           commands=_SERVE),
    Option("log_level", LOGGING, ("--log-level",), _LEVELS, "debug, info, warning or error", "LEVEL"),
)  # fmt: skip

BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}

_SYSTEM = Option("system", "command", ("--system",), FreeText(), "system message of the conversation", "TEXT")
_MAX_TOKENS = Option("max_tokens", "command", ("--max-tokens",), _TOKENS, "most tokens of an answer", "N")

_AS_JSON = Option("as_json", "command", (), Boolean(), "print one JSON object, not a table", constants={"--json": True})

COMMAND_OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "serve": (),
    "generate": (
        _switch("chat", "command", "put the prompt into the model's chat template as a user message"),
        _SYSTEM,
        _MAX_TOKENS,
        Option(
            "stop", "command", ("--stop",), FreeText(1024), "text that ends the answer; repeatable", "TEXT", repeat=True
        ),
    ),
    "chat": (_SYSTEM, _MAX_TOKENS),
    "agent": (
        Option(
            "base_url",
            "command",
            ("--base-url",),
            Text(),
            "let a server with OpenAI's chat API answer, such as "
            "http://127.0.0.1:2000/v1; --m is then the model's name there",
            "URL",
        ),
        Option("api_key", "command", ("--api-key",), Secret(), "key for that server", "KEY"),
        Option("yes", "command", (), Boolean(), "run every tool without asking", constants={"--yes": True}),
        Option(
            "approve",
            "command",
            ("--approve",),
            Text(256),
            "tool that runs without asking, or server__*; repeatable",
            "NAME",
            repeat=True,
        ),
        Option("max_turns", "command", ("--max-turns",), Integer(1, 1000), "most turns of the model", "N"),
        _SYSTEM,
        _MAX_TOKENS,
        Option("as_json", "command", (), Boolean(), "print every event as a line of JSON", constants={"--json": True}),
    ),
    "bench": (
        Option("prompt_tokens", "command", ("--prompt-tokens",), _TOKENS, "length of each prompt", "N"),
        Option("output_tokens", "command", ("--output-tokens",), _TOKENS, "length of each answer", "N"),
        Option("concurrency", "command", ("--concurrency",), Integer(1, 4096), "requests at the same time", "N"),
        Option("repeat", "command", ("--repeat",), Integer(1, 1000), "measured rounds; the median is reported", "N"),
        _AS_JSON,
    ),
    "quantize": (
        Option("out", "command", ("--out",), FilePath(), "the file to write, which ends in .gguf", "FILE"),
        Option("force", "command", (), Boolean(), "replace a file of that name", constants={"--force": True}),
        Option(
            "dtype",
            "command",
            ("--dtype",),
            _DTYPES,
            "type of matrices without --isq: auto (as stored), f32, bf16 or f16",
            "TYPE",
        ),
        Option(
            "threads",
            "command",
            ("--threads",),
            Integer(1, 1024),
            "CPU threads; without it, one per physical core",
            "N",
        ),
    ),
    "config": (_AS_JSON,),
}
"""Options of single commands; they have no environment variable and no models.yaml key."""


def settings_of(command: str) -> tuple[Option, ...]:
    """The settings that act on a command."""
    groups = COMMAND_GROUPS[command]
    return tuple(option for option in OPTIONS if option.group in groups and command in option.commands)
