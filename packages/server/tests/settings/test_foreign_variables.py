# SPDX-License-Identifier: MIT
"""Names of other deployments in the environment: honoured in their place, and nobody's server opens by a spelling."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.server.cli import main
from candle_vllm.server.commands.config import effective
from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.configuration import Configuration, load_configuration
from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.options import UsageError

Load = Callable[..., Configuration]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(line: str = "", dotenv: str | None = None, *, command: str = "serve", **environ: str) -> Configuration:
        (tmp_path / ".env").write_text(dotenv or "")
        given, _ = parse(command, line.split())
        return load_configuration(given, environ, folder=tmp_path, home=tmp_path, command=command)

    return load


def test_each_is_the_setting_that_means_the_same_and_config_says_whence(load: Load) -> None:
    made = load(
        MODEL_ID="org/name", MODEL_NAME="small", MAX_MODEL_LEN="4096", HOST="0.0.0.0", PORT="8080", API_KEY="a,b",
        HF_HOME="/cache", HF_HUB_OFFLINE="1", HF_TOKEN="plain", RUST_LOG="debug",
    )  # fmt: skip
    settings = made.settings
    assert (settings.model, settings.served_model_name, settings.max_model_len) == ("org/name", ("small",), 4096)
    assert (settings.address.host, settings.address.port, settings.api_key) == ("0.0.0.0", 8080, ("a,b",))
    assert (settings.download_dir, settings.offline) == (Path("/cache/hub"), True)
    assert (settings.hf_token, settings.log_level) == ("plain", "debug")
    told = {name: each.source for name, each in effective(made).items()}
    for name, variable in (
        ("model", "MODEL_ID"), ("served_model_name", "MODEL_NAME"), ("port", "PORT"), ("api_key", "API_KEY"),
        ("download_dir", "HF_HOME"), ("hf_token", "HF_TOKEN"), ("log_level", "RUST_LOG"),
    ):  # fmt: skip
        assert told[name] == f"the environment ({variable})"
    assert made.remarks == ()


def test_each_of_other_servers(load: Load) -> None:
    made = load(
        LLAMA_ARG_MODEL="a.gguf", LLAMA_ARG_HOST="::1", LLAMA_ARG_PORT="8080", LLAMA_ARG_CTX_SIZE="4096",
        LLAMA_ARG_N_PARALLEL="2", LLAMA_ARG_THREADS="3", LLAMA_ARG_N_GPU_LAYERS="9", VLLM_BATCH_INVARIANT="1",
        VLLM_CPU_KVCACHE_SPACE="4", VLLM_ATTENTION_BACKEND="TRITON_ATTN", VLLM_LOGGING_LEVEL="WARNING",
    )  # fmt: skip
    settings = made.settings
    assert (settings.model, settings.host, settings.port, settings.max_model_len) == ("a.gguf", "::1", 8080, 4096)
    assert (settings.max_num_seqs, settings.threads, settings.gpu_layers, settings.deterministic) == (2, 3, 9, True)
    assert (settings.kv_cache_memory_bytes, settings.attention_backend) == (4 << 30, "triton")
    assert (settings.log_level, made.remarks) == ("warning", ())
    usual = {"LLAMA_ARG_CTX_SIZE": "0", "LLAMA_ARG_N_PARALLEL": "-1", "LLAMA_ARG_THREADS": "-1"}
    assert load(**usual, LLAMA_ARG_N_GPU_LAYERS="-1", VLLM_CPU_KVCACHE_SPACE="0").settings == load().settings
    (remark,) = load(LLAMA_ARG_HOST="0.0.0.0").remarks
    assert remark.startswith("LLAMA_ARG_HOST in the environment (0.0.0.0) is not used without an API key")
    (remark,) = load(VLLM_TORCH_COMPILE_LEVEL="3").remarks
    assert remark == "VLLM_TORCH_COMPILE_LEVEL in the environment has no effect: torch.compile is not used"
    (remark,) = load(VLLM_LORA_RESOLVER_CACHE_DIR="/adapters").remarks
    assert remark.endswith("has no effect: --lora-resolver local=DIR serves the adapters in a folder")


def test_variables_of_llama_server_that_are_not_read_are_named(load: Load) -> None:
    (remark,) = load(LLAMA_ARG_ALIAS="a", LLAMA_ARG_CTX_SIZE="0").remarks
    assert remark.startswith("LLAMA_ARG_ALIAS in the environment has no effect: llama-server's flags are read")
    assert load(command="bench", LLAMA_ARG_ALIAS="a").remarks == ()


def test_the_order_is_flags_then_our_variables_then_these_then_dotenv(load: Load) -> None:
    dotenv = "CANDLE_VLLM_PORT=4\n"
    assert load("--p 1", dotenv, PORT="3", CANDLE_VLLM_PORT="2").settings.port == 1
    assert load("", dotenv, PORT="3", CANDLE_VLLM_PORT="2").settings.port == 2
    assert load("", dotenv, PORT="3").settings.port == 3
    assert load("", dotenv).settings.port == 4
    assert load("", "PORT=5\nMODEL_ID=x\nAPI_KEY=k\n").settings == load().settings


def test_of_two_names_for_one_setting(load: Load) -> None:
    assert load(MODEL_NAME="org/name").settings.model == "org/name"
    made = load(API_KEY="a", VLLM_API_KEY="b")
    assert made.settings.api_key == ("b",)
    assert made.remarks == ("API_KEY in the environment is not used: VLLM_API_KEY sets the key",)
    assert load(API_KEY="a", VLLM_API_KEY="a").remarks == ()
    assert load(LLAMA_API_KEY="a,").settings.api_key == ("a",)  # as llama-server reads it
    for wrong in (",", "a, b"):
        with pytest.raises(UsageError, match="LLAMA_API_KEY in the environment"):
            load(LLAMA_API_KEY=wrong)
    llama = load(LLAMA_API_KEY="a,b", LLAMA_ARG_HOST="0.0.0.0")
    assert (llama.settings.api_key, llama.settings.host, llama.remarks) == (("a", "b"), "0.0.0.0", ())


@pytest.mark.parametrize("line", ["--m other", "--w folder", "--f file.gguf"])
def test_a_model_of_the_command_line_takes_the_name_as_well(load: Load, line: str) -> None:
    settings = load(line, MODEL_ID="org/name", MODEL_NAME="small").settings
    assert settings.model in ("other", None)
    assert settings.served_model_name == ()


@pytest.mark.parametrize("host", ["zsh-machine", "x86_64-linux-gnu", "example.org", "0.0.0.0:80", "tcp://10.0.0.1", ""])
def test_host_counts_only_as_an_address(load: Load, host: str) -> None:
    made = load(HOST=host, API_KEY="k")
    assert made.settings.address.host == "127.0.0.1"
    assert made.remarks == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_host_opens_no_server_without_a_key(load: Load, host: str) -> None:
    made = load(HOST=host)
    assert made.settings.address.host == "127.0.0.1"
    (remark,) = made.remarks
    assert remark.startswith(f"HOST in the environment ({host}) is not used without an API key")
    for keyed in (
        load(HOST=host, API_KEY="k"),
        load("--api-key k", HOST=host),
        load("", "CANDLE_VLLM_API_KEY=k", HOST=host),
    ):
        assert (keyed.settings.address.host, keyed.remarks) == (host, ())
    assert load(f"--h {host}", HOST=host).settings.address.host == host  # who says so means it
    for inside in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert load(HOST=inside).settings.address.host == inside


def test_an_empty_key_is_none_and_said_to_be(load: Load) -> None:
    made = load(API_KEY="", MODEL_ID="", PORT="")
    assert made.settings == load().settings
    assert made.remarks == ("API_KEY in the environment is empty and is not used as a key",)


@pytest.mark.parametrize(
    "name",
    ["APIKEY", "API_TOKEN", "API_KEYS", "api_key", "VLLM_APIKEY", "LLAMA_APIKEY", "AUTH_TOKEN", "SERVER_KEY", "TOKEN",
     "CANDLE_API_KEY", "OLLAMA_API_KEY", "ACCESS_TOKEN"],
)  # fmt: skip
def test_what_looks_like_a_key_and_is_none_is_warned_of(load: Load, name: str) -> None:
    (remark,) = load(**{name: "secret"}).remarks
    assert remark == f"{name} in the environment is not the server's API key, and none is set: use CANDLE_VLLM_API_KEY"
    assert load("--api-key k", **{name: "secret"}).remarks == ()
    assert load(**{name: "secret"}, command="bench").remarks == ()


def test_keys_in_dotenv_are_warned_of_as_they_are_not_read(load: Load) -> None:
    (remark,) = load("", "API_KEY=secret\nGITHUB_TOKEN=x\n").remarks
    assert remark == "API_KEY in .env is not the server's API key, and none is set: use CANDLE_VLLM_API_KEY"


def test_a_client_s_key_is_a_reason_to_warn_where_others_reach_the_server(load: Load) -> None:
    assert load(OPENAI_API_KEY="sk-x", ANTHROPIC_API_KEY="x", HF_TOKEN="hf_x", GITHUB_TOKEN="x").remarks == ()
    (remark,) = load("--h 0.0.0.0", OPENAI_API_KEY="sk-x").remarks
    assert remark.startswith("OPENAI_API_KEY in the environment is not the server's API key")


def test_a_misspelt_key_of_ours_ends_the_start(load: Load) -> None:
    with pytest.raises(UsageError, match=r"unknown variable CANDLE_VLLM_APIKEY .*did you mean CANDLE_VLLM_API_KEY"):
        load(CANDLE_VLLM_APIKEY="secret")


def test_values_that_are_none(load: Load) -> None:
    for name, value in (("MAX_MODEL_LEN", "long"), ("API_KEY", "two words"), ("VLLM_API_KEY", "ä")):
        with pytest.raises(UsageError, match=f"{name} in the environment must be") as caught:
            load(**{name: value})
        assert "two words" not in str(caught.value)
    made = load(PORT="/dev/ttyUSB0", HF_HUB_OFFLINE="maybe")
    assert made.settings == load().settings
    assert [remark.split()[0] for remark in made.remarks] == ["PORT", "HF_HUB_OFFLINE"]


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", "info"), ("trace", "debug"), ("warn,candle_vllm=debug", "debug"), ("hyper=trace", "info"),
        ("candle-vllm-server=error,warn", "error"), ("nonsense", "info"), ("WARN", "warning"),
        ("candle_vllm_server=debug,candle_vllm_core=info", "debug"), (",=,x=", "info"),
    ],
)  # fmt: skip
def test_rust_log(load: Load, text: str, level: str) -> None:
    assert load(RUST_LOG=text).settings.log_level == level
    assert load("--log-level info", RUST_LOG="debug").settings.log_level == "info"


def test_names_of_servers_mean_nothing_to_other_commands(load: Load) -> None:
    made = load(command="bench", MODEL_NAME="gpt-4", MAX_MODEL_LEN="x", API_KEY="two words", HF_HUB_OFFLINE="1")
    assert (made.settings.model, made.settings.max_model_len, made.settings.offline) == (None, None, True)
    asks = load(command="ps", PORT="8080", API_KEY="k", MODEL_NAME="gpt-4").settings  # the server of the same container
    assert (asks.port, asks.api_key, asks.model) == (8080, ("k",), None)


def test_config_warns_and_shows_whence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("HOME", str(tmp_path)), ("PORT", "8080"), ("HOST", "0.0.0.0"), ("APIKEY", "secret")):
        monkeypatch.setenv(name, value)
    for name in ("API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model").mkdir()
    write_toy_model(tmp_path / "model")
    assert main(["config", "--m", "./model"]) == 0
    told = capsys.readouterr()
    assert re.search(r"port +8080 +the environment \(PORT\)", told.out)
    assert re.search(r'host +"127.0.0.1" +default', told.out)
    assert "HOST in the environment (0.0.0.0) is not used" in told.err
    assert "APIKEY in the environment is not the server's API key" in told.err
    assert "secret" not in told.out + told.err


SERVICE = {
    "MODEL_ID": "org/name",
    "MAX_LORAS": "10",
    "MAX_LORA_RANK": "16",
    "MAX_CPU_LORAS": "5",
    "CACHE_DIR": "/cache",
}
"""What a service of adapters is set up by, and its own defaults."""


def test_the_names_of_a_service_of_adapters_boot_as_they_are(load: Load) -> None:
    made = load(**SERVICE, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    settings = made.settings
    assert (settings.enable_lora, settings.max_loras, settings.max_lora_rank, settings.max_cpu_loras) == (
        True,
        10,
        16,
        5,
    )
    assert (settings.download_dir, settings.allow_runtime_lora) == (Path("/cache"), True)
    assert engine_config(settings).max_cpu_loras == 5
    told = {name: each.source for name, each in effective(made).items()}
    assert told["enable_lora"] == "the environment (MAX_LORAS)"
    off = load("--no-enable-lora", **SERVICE).settings
    assert (off.enable_lora, off.max_loras) == (False, None)
    assert load(CACHE_DIR="/cache").settings.download_dir is None  # of any program
    with pytest.raises(UsageError, match="MAX_LORAS"):
        load(MAX_LORAS="many")
