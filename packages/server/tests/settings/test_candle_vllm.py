# SPDX-License-Identifier: MIT
"""What people bring from candle-vllm, the original: its command lines work, or say what has no effect here."""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_vllm.responses.mcp.config import load_mcp_config
from candle_vllm.server.cli import configure_logging, say
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.configuration import Configuration, load_configuration
from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.options import UsageError

Load = Callable[..., Configuration]
FILES = Path(__file__).parent / "candle_vllm"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The configuration of a command line in an empty folder, or one with the files that are given."""
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    home.mkdir()

    def load(
        line: str = "", env: dict[str, str] | None = None, *, command: str = "serve", prompt: str = "",
        models: str | None = None, env_file: str | None = None,
    ) -> Configuration:  # fmt: skip
        for name, text in (("models.yaml", models), (".env", env_file)):
            (folder / name).unlink(missing_ok=True)
            if text is not None:
                (folder / name).write_text(text)
        given, _ = parse(command, [*line.split(), *([prompt] if prompt else [])])
        return load_configuration(given, env or {}, folder=folder, home=home, command=command)

    return load


# ---- command lines ---------------------------------------------------------------------------------------------------


def test_a_model_is_divided_among_several_devices(load: Load, tmp_path: Path) -> None:
    made = load(f"--d 0,1 --w {tmp_path} --isq q4k --ui-server")
    config = engine_config(made.settings)
    assert (config.device, config.tensor_parallel_size) == ("cuda:0,cuda:1", 2)
    assert engine_config(load("--m x --cpu --num-shards 2").settings).tensor_parallel_size == 2
    assert load("--d 2 --m x").remarks == ()


@pytest.mark.parametrize("devices", ["0,", "cpu,0", "0,cpu", ",", "0,1000"])
def test_lists_of_devices_that_are_none(load: Load, devices: str) -> None:
    with pytest.raises(UsageError, match="must be auto, cpu, cuda or cuda:N"):
        load(f"--d {devices}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--log --p 2000", "--log-file candle-vllm.log --port 2000"),
        ("--dtype fp16", "--dtype f16"),
        ("--dtype half", "--dtype f16"),
        ("--dtype fp32", "--dtype f32"),
        ("--dtype bfloat16", "--dtype bf16"),
        ("--kvcache-dtype e4m3", "--kv-cache-dtype fp8"),
        ("--kvcache-dtype bf16", "--kv-cache-dtype auto"),
        ("--kv-cache-dtype int8", "--kv-cache-dtype int8_per_token_head"),
        ("--kvcache-dtype turbo8", "--kv-cache-dtype q8_0"),
        ("--kvcache-dtype k8v4", "--kv-cache-dtype q8_0"),
        ("--kvcache-dtype turbo4", "--kv-cache-dtype q4_0"),
        ("--kvcache-dtype 4bit", "--kv-cache-dtype q4_0"),
        ("--mcp-command python --mcp-args -m,server", "--mcp-command python --mcp-args=-m,server"),
        ("--h socket:///run/x.sock", "--h unix:///run/x.sock"),
        ("--h file:///run/x.sock", "--h unix:///run/x.sock"),
    ],
)
def test_their_spellings_mean_what_ours_mean(load: Load, theirs: str, ours: str) -> None:
    theirs_made, ours_made = load(theirs).settings, load(ours).settings
    assert theirs_made.address == ours_made.address
    assert engine_config(theirs_made) == engine_config(ours_made)
    assert (theirs_made.log_file, theirs_made.mcp_args) == (ours_made.log_file, ours_made.mcp_args)
    assert load(theirs).remarks == ()


def test_prompts_that_are_not_cut(load: Load) -> None:
    assert engine_config(load("--prefill-chunk-size 0").settings).max_num_batched_tokens == 0


@pytest.mark.parametrize("name", ["turbo3", "k3v4"])
def test_a_compressed_cache_is_refused_with_what_there_is(load: Load, name: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"must be one of auto, fp8, .*, q8_0, q6_0, q5_1, iq4_nl, q4_0: the cache has 16 bits per element, or 8 ",
    ):
        load(f"--kvcache-dtype {name}")


def test_flags_that_set_nothing_are_taken_with_a_remark(load: Load) -> None:
    line = "--holding-time 100 --verbose --multithread --kvcache-mem-cpu=512 --prompt-cache-backend sled --m x"
    made = load(line)
    assert made.settings.model == "x"
    assert [remark.split()[0] for remark in made.remarks] == [
        "--holding-time", "--verbose", "--multithread", "--kvcache-mem-cpu", "--prompt-cache-backend",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--holding-time: expected one argument"):
        load("--holding-time")


def test_the_log_goes_to_a_file_as_well_that_others_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, root = tmp_path / "candle-vllm.log", logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        for _ in range(2):
            configure_logging("info", file=file)
            say(("one thing has no effect",))
        for handler in root.handlers:
            handler.close()
    finally:
        root.setLevel(level)
    assert file.read_text().count("one thing has no effect") == 2
    assert "one thing has no effect" in capsys.readouterr().err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_flag_that_it_documents_at_once(load: Load) -> None:
    line = (
        "--m org/name --f a.gguf --hf-token MINE --h 127.0.0.1 --p 2000 --verbose --max-num-seqs 8 --block-size 32 "
        "--dtype bf16 --isq q4k --cpu --mem 4096 --mamba-fraction 0.15 --kvcache-mem-cpu 0 --record-conversation "
        "--holding-time 100 --multithread --log --temperature 0.7 --top-p 0.9 --min-p 0.05 --top-k 40 "
        "--frequency-penalty 0.1 --presence-penalty 0.1 --prefill-chunk-size 8192 --kvcache-dtype auto "
        "--disable-prefix-cache --prefix-cache-max-tokens 4096 --disable-cuda-graph --ui-server --mcp-command uvx "
        "--mcp-args server-time,--utc --mcp-config mcp.json --enforce-parser qwen --yarn-scaling-factor 2.0 "
        "--queue-size 10 --request-timeout 30 --prompt-cache --prompt-cache-backend memory --prompt-cache-ttl 60"
    )
    made = load(line, {"MINE": "hf_mine"})
    config = engine_config(made.settings)
    assert (config.model, config.weight_file, config.isq, config.device) == ("org/name", "a.gguf", "q4k", "cpu")
    assert (config.kv_cache_memory, config.max_num_batched_tokens, config.hf_token) == (4096 << 20, 8192, "hf_mine")
    assert (made.settings.mcp_args, made.settings.tool_parser) == ("server-time,--utc", "qwen")
    assert [remark.split()[0] for remark in made.remarks] == [
        "--verbose", "--mamba-fraction", "--kvcache-mem-cpu", "--record-conversation", "--holding-time",
        "--multithread", "--prefix-cache-max-tokens", "--prompt-cache", "--prompt-cache-backend", "--prompt-cache-ttl",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["--vision-device cpu", "--vision-dtype f16"])
def test_what_would_change_the_answer_is_refused_with_the_reason(load: Load, line: str) -> None:
    with pytest.raises(UsageError, match=f"{line.split()[0]}.* is not supported: "):
        load(line)


# ---- its files -------------------------------------------------------------------------------------------------------

SAID = {
    "example.models": [
        "parking_lot.pool: worker_threads", "parking_lot.pool: max_blocking_threads",
        "parking_lot.pool: thread_stack_size", "kvcache_mem_cpu", "multithread",
        "prompt_cache: min_prefix_length", "vision_mode proxy",
        "parking_lot: timeout_secs", "quantization",
    ],
    "models": ["multithread"],
    "models-minimal": [],
    "models-optimized": ["multithread", "kvcache_compression", "prompt_cache: ttl_seconds", "vision_mode native"],
    "models-fixed": [],
    "sample.models": ["quantization", "worker_threads", "max_units", "parking_lot: mailbox has no effect"],
    "test.models": [],
    "parking-lot.models": ["worker_threads", "max_units", "queue: backend, persistence, postgres_url", "surrealdb"],
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_its_model_files_are_read_and_what_has_no_effect_is_named(load: Load, name: str) -> None:
    made = load(models=(FILES / f"{name}.yaml").read_text())
    left = list(made.remarks)
    for part in SAID[name]:
        (found,) = [remark for remark in left if part in remark]
        left.remove(found)
    assert left == []


def test_no_model_file_of_it_is_left_out() -> None:
    assert {path.name.removesuffix(".yaml") for path in FILES.glob("*.yaml")} == set(SAID)


def _entries(load: Load, name: str) -> dict[str, Settings]:
    made = load(models=(FILES / f"{name}.yaml").read_text())
    return {entry.name: entry.settings for entry in made.catalogue.entries}


def test_keys_with_a_meaning_are_honoured(load: Load) -> None:
    example = _entries(load, "example.models")
    mistral, vision, local = example["mistral"], example["qwen-vl"], example["local"]
    assert (mistral.device, mistral.mem, mistral.isq, mistral.enable_prefix_caching) == ("auto", 4096, "q4k", True)
    assert (vision.device, vision.mem, vision.dtype, vision.max_queued_requests) == ("cuda:0,cuda:1", 8192, "f16", 32)
    assert (local.isq, local.mem, mistral.max_queued_requests, mistral.request_timeout) == (None, 2048, 1000, 120)
    optimized = _entries(load, "models-optimized")
    assert [(one.mem, one.dtype, one.temperature) for one in optimized.values()] == [
        (8192, "bf16", 0.2), (2048, "bf16", 0.2)
    ]  # fmt: skip
    fixed, sample = _entries(load, "models-fixed")["fixed"], _entries(load, "sample.models")["a"]
    assert (fixed.device, fixed.isq, fixed.mem, sample.enable_prefix_caching) == ("cuda:1,cuda:2", None, 4096, False)
    tiny = _entries(load, "models-minimal")["tiny"]
    assert (tiny.device, tiny.max_images, vision.max_images) == ("cpu", 0, None)  # vision_mode disabled, proxy


def test_the_mailbox_of_a_parking_lot(load: Load) -> None:
    text = (FILES / "parking-lot.models.yaml").read_text()
    made = load(models=text)
    assert (made.settings.request_timeout, made.settings.max_queued_requests) == (60, 50)
    assert made.mailbox is not None
    assert made.mailbox.retention_secs == 600
    assert made.mailbox.webhook.url is None  # it is not enabled, so its secrets need not be there either
    on = text.replace("enabled: false", "enabled: true")
    with pytest.raises(UsageError, match="SIGNING_SECRET, which is not set"):
        load(models=on)
    secrets = {"WEBHOOK_TOKEN": "t", "SIGNING_SECRET": "s"}
    mailbox = load(models=on, env=secrets).mailbox
    assert mailbox is not None
    assert (mailbox.webhook.url, mailbox.webhook.signing_secret) == ("https://example.com/hook", "s")
    mailbox = load(models=on.replace("sign_payload: true", "sign_payload: false"), env=secrets).mailbox
    assert mailbox is not None
    assert mailbox.webhook.signing_secret == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("device_ids: 0", "device_ids must be a list of at most 64 whole numbers"),
        ("device_ids: [-1]", "device_ids must be between 0 and 999"),
        ("device_ids: [cpu]", "device_ids must be a whole number"),
        ("device_ids: [0], device: cpu", "device_ids and device are the same setting"),
        ("mem: 1, kvcache_mem_gpu: 2", "kvcache_mem_gpu and mem are the same setting"),
        ("prompt_cache: {enabled: sometimes}", "prompt_cache.enabled must be true or false"),
        ("prompt_cache: {enabld: true}", "unknown key 'enabld' (did you mean enabled?)"),
        ("prompt_cache: true", "prompt_cache must be a mapping"),
        ("prompt_cache_path: a, prompt_cache: {cache_path: b}", "cache_path and prompt_cache_path are the same"),
        ("kvcache_compression: 3", "kvcache_compression must be a mapping"),
        ("parking_lot: {limit: {}}", "unknown key 'limit' (did you mean limits?)"),
        (
            "parking_lot: {limits: {timeout_secs: 1h}}",
            "limits, line 4: timeout_secs must be a whole number",
        ),
        ("parking_lot: {pool: {max_queue_depth: 0}}", "parking_lot.pool, line 4: max_queue_depth must be between 1"),
        ("mem: 1}\n    capabilities: {vision_mode: maybe", "vision_mode must be one of disabled, proxy, native"),
        ("mem: 1}\n    capabilities: {vision: true", "unknown key 'vision'"),
    ],
)
def test_wrong_values_of_its_keys_are_refused_by_name(load: Load, change: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load(models=f"models:\n  - name: a\n    hf_id: b/c\n    params: {{{change}}}\n")


def test_its_environment_is_read_and_what_has_no_effect_is_named(load: Load) -> None:
    text = (FILES / "example.env").read_text()
    made = load(env_file=text, models=(FILES / "models-minimal.yaml").read_text())
    assert (made.settings.enable_prefix_caching, made.settings.hf_token) == (True, "hf_replace_me")
    cache, *others = made.remarks
    assert made.settings.prompt_cache_path == Path("~/.candle-vllm/cache").expanduser()
    for name in ("BACKEND", "REDIS_URL", "TTL", "MAX_PREFIXES", "MIN_LENGTH"):
        assert f"CANDLE_VLLM_PROMPT_CACHE_{name}" in cache
    assert "no effect, because prompt prefixes are stored in the KV cache itself" in cache
    assert sorted(remark.split()[0] for remark in others) == ["KEEP_ALIVE_INTERVAL", "MCP_PROXY_PORT", "RUST_LOG"]
    quiet = load("--m demo", command="generate", prompt="hi", env_file=text, models="models: [{name: a, hf_id: b/c}]")
    assert quiet.remarks == ()


@pytest.mark.parametrize(
    ("variables", "name", "value"),
    [
        ({"PROMPT_CACHE_ENABLED": "false"}, "enable_prefix_caching", False),
        ({"PROMPT_CACHE_ENABLED": "false", "ENABLE_PREFIX_CACHING": "true"}, "enable_prefix_caching", True),
        ({"PROMPT_CACHE_REDIS_URL": "redis://a:1", "PROMPT_CACHE_BACKEND": "redis"}, "prompt_cache_url", "redis://a:1"),
        ({"PROMPT_CACHE_REDIS_URL": "redis://a:1", "PROMPT_CACHE_BACKEND": "sled"}, "prompt_cache_url", None),
        ({"MODELS_CONFIG": "/path/to/models.yaml"}, "models_config", None),
        ({"STREAM_AS_REASONING_CONTENT": "0"}, "reasoning_parser", "none"),
        ({"STREAM_AS_REASONING_CONTENT": "1"}, "reasoning_parser", None),
    ],
)
def test_its_variables_with_a_meaning(load: Load, variables: dict[str, str], name: str, value: object) -> None:
    made = load(env={f"CANDLE_VLLM_{key}": text for key, text in variables.items()})
    assert getattr(made.settings, name) == value
    with pytest.raises(UsageError, match="must be true or false"):
        load(env={"CANDLE_VLLM_PROMPT_CACHE_ENABLED": "perhaps"})


@pytest.mark.parametrize(
    ("section", "path", "url"),
    [
        ("backend: redis, redis_url: 'redis://a:1'", None, "redis://a:1"),
        ("backend: sled, cache_path: /kept, redis_url: 'redis://a:1'", Path("/kept"), None),
        ("cache_path: /kept", Path("/kept"), None),
        ("backend: memory, cache_path: /kept", None, None),
        ("enabled: false, cache_path: /kept", None, None),
    ],
)
def test_its_prompt_cache_is_kept_where_it_says(load: Load, section: str, path: Path | None, url: str | None) -> None:
    made = load(models=f"models: [{{name: a, hf_id: b/c, params: {{prompt_cache: {{{section}}}}}}}]")
    assert (made.settings.prompt_cache_path, made.settings.prompt_cache_url) == (path, url)


def test_its_webhook_is_signed_as_its_receivers_check(load: Load) -> None:
    hook = "{enabled: true, url: 'https://a.example/', auth: {type: hmac, secret: word%s}}"
    text = "models: [{name: a, hf_id: b/c}]\nparking_lot: {mailbox: {backend: sqlite, sqlite_path: /m, webhook: %s}}"
    for more, signs in (("", "body"), (", signs: timestamp", "timestamp")):
        mailbox = load(models=text % (hook % more)).mailbox
        assert mailbox is not None
        assert mailbox.webhook is not None
        assert mailbox.webhook.auth.signs == signs


def test_its_files_of_mcp_servers_are_read(caplog: pytest.LogCaptureFixture) -> None:
    listed = load_mcp_config(FILES / "mcp-list.json", environ={}).servers
    assert [(server.name, server.url, server.timeout, server.instructions) for server in listed] == [
        ("docs", "http://localhost:8080", 30, "Look here."), ("search", "https://search.example.com/mcp", 60, None)
    ]  # fmt: skip
    assert caplog.text == ""
    files, time, web = load_mcp_config(FILES / "mcp-named.json", environ={}).servers
    assert (files.command, files.args, files.env) == ("npx", ("-y", "server-files", "/data"), {"LEVEL": "info"})
    assert (time.transport, time.timeout) == ("stdio", 10)
    assert (web.url, web.headers) == ("http://localhost:3000/web", {"X-Team": "a"})
    assert caplog.text.count("is a program that runs the server, not a transport") == 2


# ---- what lies in the working folder ---------------------------------------------------------------------------------


def test_a_models_file_that_is_not_needed_ends_nothing(load: Load) -> None:
    for line in ("--m ./some.gguf", "--m org/name", "--w folder", "--f some.gguf", "--m demo"):
        made = load(line, command="generate", prompt="hi", models="models: broken\n")
        assert made.models_file is None
        assert "models must be a list" in made.remarks[0]
        assert "the file is ignored" in made.remarks[0]
    for command in ("list", "ps"):  # which have no model at all
        assert "the file is ignored" in load("", command=command, models="models: broken\n").remarks[0]
    for line in ("", "--m small", "--m default", "--m x/y --models-config models.yaml"):
        with pytest.raises(UsageError, match="models must be a list"):
            load(line, command="generate", prompt="hi", models="models: broken\n")


def test_what_is_wrong_in_dotenv_ends_commands_that_need_it(load: Load) -> None:
    text = "CANDLE_VLLM_PORT=x\nCANDLE_VLLM_PROT=1\nnot a line\nCANDLE_VLLM_SEED=5\n"
    made = load("", command="generate", prompt="hi", env_file=text)
    assert made.settings.seed == 5
    assert len(made.remarks) == 3
    with pytest.raises(UsageError, match="CANDLE_VLLM_SEED"):
        load("", command="generate", prompt="hi", env_file="CANDLE_VLLM_SEED=x\n")
    with pytest.raises(UsageError, match="not a line of the form"):
        load(env_file=text)
    endless = "#" * ((1 << 20) + 1)  # cannot be read at all, as one that is not UTF-8 or belongs to somebody else
    assert "is larger than 1 MB; the file is ignored" in load(command="list", env_file=endless).remarks[0]
    with pytest.raises(UsageError, match="is larger than 1 MB"):
        load(env_file=endless)
