# SPDX-License-Identifier: MIT
"""Settings: precedence of the sources, rivals, models.yaml, addresses, tokens; every mistake is named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from candle_vllm.core.shown import HIDDEN, without_secrets
from candle_vllm.server.commands.config import effective
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.adapters import read_specs
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry, source_name
from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.configuration import Configuration, load_configuration, load_settings
from candle_vllm.server.settings.models_file import read_models_file
from candle_vllm.server.settings.options import UsageError, shown
from candle_vllm.server.settings.sources import SettingsSource
from candle_vllm.server.settings.table import BY_NAME, OPTIONS, AccessOptions, ListenerOptions

MODELS = """
default_model: small
models:
  - name: small
    hf_id: org/small
    weight_file: small.gguf
    params: {temperature: 0.25, max_model_len: 4K, mem: 64, chat_template: small.jinja, max_num_batched_tokens: 256}
  - name: near
    local_path: weights/near
"""


@pytest.fixture
def load(tmp_path: Path):
    """Merges a command line, an environment, a .env and a models.yaml; `home` and `folder` are empty otherwise."""
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    home.mkdir()

    def load(
        line: str = "",
        env: Mapping[str, str] | None = None,
        dotenv: str | None = None,
        models: str | None = None,
        in_home: bool = False,
    ) -> Settings:
        if dotenv is not None:
            (folder / ".env").write_text(dotenv)
        if models is not None:
            path = home / ".candle-vllm" / "models.yaml" if in_home else folder / "models.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(models)
        given, _ = parse("serve", line.split())
        return load_settings(given, env or {}, folder=folder, home=home)

    return load


def test_defaults(load) -> None:
    settings = load()
    assert settings == Settings()
    assert (settings.address.host, settings.address.port) == ("127.0.0.1", 2000)


def test_precedence(load) -> None:
    models = MODELS.replace("temperature: 0.25", "temperature: 0.25, top_k: 4, seed: 4, block_size: 64")
    env = {"CANDLE_VLLM_TOP_K": "2", "CANDLE_VLLM_TEMPERATURE": "0.2", "PATH": "/bin"}
    dotenv = "CANDLE_VLLM_TEMPERATURE=0.3\nCANDLE_VLLM_TOP_K=3\nexport CANDLE_VLLM_SEED='3' # three\nOTHER=1\n"
    settings = load("--temperature 0.1", env, dotenv, models)
    assert (settings.temperature, settings.top_k, settings.seed, settings.block_size) == (0.1, 2, 3, 64)
    assert settings.default_sampling == {"temperature": 0.1, "top_k": 2}


@pytest.mark.parametrize(
    ("short", "long", "name"),
    [
        ("--m x", "--model x", "model"),
        ("--w x", "--weight-path x", "weight_path"),
        ("--f x", "--weight-file x", "weight_file"),
        ("--h x", "--host x", "host"),
        ("--p 3", "--port 3", "port"),
        ("--d 0", "--device cuda:0", "device"),
        ("--cpu", "--device cpu", "device"),
        ("--dtype float32", "--dtype f32", "dtype"),
        ("--prefill-chunk-size 1k", "--max-num-batched-tokens 1000", "prefill_chunk_size"),
        ("--disable-prefix-cache", "--no-enable-prefix-caching", "enable_prefix_caching"),
    ],
)
def test_short_and_long_names_mean_the_same(load, short: str, long: str, name: str) -> None:
    assert getattr(load(short), name) == getattr(load(long), name)
    assert load(short) != load()


def test_repeatable_flags_and_lists_in_variables(load) -> None:
    assert load("--api-key a --api-key b").api_key == ("a", "b")
    assert load(env={"CANDLE_VLLM_API_KEY": "a, b"}).api_key == ("a", "b")
    assert load("--api-key c", {"CANDLE_VLLM_API_KEY": "a"}).api_key == ("c",)


def test_adapters_in_json_in_a_variable(load) -> None:
    one, two = '{"name": "a", "path": "/x"}', '{"name":"b","path":"/y,z","scale":2}'
    for text, expected in ((one, (one,)), (f"{one}, {two}", (one, two)), ("a=/x,b=/y", ("a=/x", "b=/y")),
                           (f"c=/x{{1}},{two} ,d=/w", ("c=/x{1}", two, "d=/w"))):  # fmt: skip
        assert load(env={"CANDLE_VLLM_LORA_MODULES": text}).lora_modules == expected


def test_secrets_do_not_show(load) -> None:
    assert "topsecret" not in repr(load("--api-key topsecret --hf-token hf_topsecret"))
    assert "topsecret" not in json.dumps([shown(BY_NAME["mcp_args"], "--token topsecret")])


ADDRESS = "https://user:SECRET@h.example:8000/m/{name}.tar.gz?sig=SECRET#SECRET"
FORMS = (ADDRESS, f"tar={ADDRESS}", f"a={ADDRESS}", json.dumps({"name": "a", "path": ADDRESS, "model": ADDRESS}),
         "https://SECRET@h.example", "http://h.example/?SECRET", "redis://:SECRET@h.example/0")  # fmt: skip


def test_no_setting_shows_the_secrets_of_an_address() -> None:
    """Whatever may hold an address is shown without them, and so is why another setting cannot hold it."""
    taken: set[str] = set()
    for option in OPTIONS:
        for text in FORMS:
            try:
                value = option.kind.from_text(text)
                settings = Settings(**{option.name: (value,) if option.repeat else value})
            except ValueError as error:
                said = without_secrets(str(error))
            except UsageError as error:
                said = without_secrets(str(error))
            else:
                taken.add(option.name)
                told = json.dumps(shown(option, getattr(settings, option.name)))
                assert "h.example" in told or HIDDEN in told
                entry = ModelEntry(source_name(settings, None), settings)
                rows = effective(Configuration(settings, settings, Catalogue([entry]), ()))
                said = told + repr(settings) + repr(entry) + "".join(str(row.value) for row in rows.values())
            assert "SECRET" not in said, (option.name, text)
    assert taken > {"model", "lora_resolver", "lora_modules", "otlp_endpoint", "mailbox", "speculative_config"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--modle x", "unknown flag --modle (did you mean --model?)"),
        ("--isq q4", "--isq must be one of q4_0, q4_1"),
        ("--mod x", "unknown flag --mod"),
        ("--p 65536", "--p/--port must be between 0 and 65535, not 65536"),
        ("--port", "--p/--port: expected one argument"),
        ("--max-num-seqs 0", "--max-num-seqs must be between 1 and 4096, not 0"),
        ("--temperature nan", "--temperature must be a number"),
        ("--dtype fp8", "must be one of auto, f32, bf16, f16, not 'fp8'"),
        ("--p 0 x y", "unexpected argument 'x'"),
        ("--mem 1 --kv-fraction 0.2", "--mem and --kv-fraction both set the KV cache size: give one"),
        ("--m x --w y", "--m and --w both set the model source"),
        ("--max-tokens 3", "--max-tokens does not apply to `candle-vllm serve`, only to"),
        ("--max-tokns 3", "unknown flag --max-tokns"),
        ("--h http://x:1 --p 2", "name two ports"),
        ("--m default", "needs a models.yaml"),
        ("--models-config no.yaml", "no.yaml: No such file or directory"),
        ("--hf-token NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE, which is not set"),
        ("--hf-token a-b", "begins with hf_"),
        ("--hf-token-path no-such", "cannot read the Hugging Face token"),
    ],
)
def test_mistakes_on_the_command_line(load, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load(line)


@pytest.mark.parametrize("name", [".env", "models.yaml", "models.yml"])
def test_a_link_to_a_missing_file_is_not_ignored(load, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder" / name).symlink_to("missing")
    with pytest.raises(UsageError, match=f"cannot read .*{re.escape(name)}: No such file or directory"):
        load()


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_pipe_into_which_no_program_writes_is_refused(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "folder" / ".env")
    monkeypatch.setattr(select, "select", lambda *_: ([], [], []))  # as after half a minute
    with pytest.raises(UsageError, match=r"\.env: no program writes to this pipe"):
        load()


@pytest.mark.skipif(sys.platform == "win32", reason="needs links to devices")
def test_dev_null_masks_a_models_yaml(load, tmp_path: Path) -> None:
    (tmp_path / "folder" / "models.yaml").symlink_to("/dev/null")
    assert load().models_config is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs /dev/fd")
def test_models_yaml_may_be_a_pipe(load) -> None:
    reading, writing = os.pipe()
    os.write(writing, MODELS.encode())
    os.close(writing)
    with os.fdopen(reading):
        assert load(f"--models-config /dev/fd/{reading}").weight_file == "small.gguf"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"CANDLE_VLLM_PROT": "1"},
            "unknown variable CANDLE_VLLM_PROT in the environment (did you mean CANDLE_VLLM_PORT",
        ),
        ({"CANDLE_VLLM_PORT": "x"}, "CANDLE_VLLM_PORT in the environment must be a whole number"),
        ({"CANDLE_VLLM_IDLE_UNLOAD_SECS": "10m"}, "whole number, not '10m' (in seconds: 600 is ten minutes)"),
        ({"CANDLE_VLLM_API_KEY": ""}, "CANDLE_VLLM_API_KEY in the environment must be"),
        ({"CANDLE_VLLM_API_KEY": "a,,b"}, "CANDLE_VLLM_API_KEY in the environment must be"),
        ({"CANDLE_VLLM_OFFLINE": "maybe"}, "must be true or false"),
        ({"CANDLE_VLLM_PORT": "tcp://10.0.0.1:2000"}, "enableServiceLinks"),
        ({"CANDLE_VLLM_SERVICE_HOST": "10.0.0.1"}, "enableServiceLinks"),
        ({"CANDLE_VLLM_PORT_2000_TCP": "x"}, "enableServiceLinks"),
    ],
)
def test_mistakes_in_the_environment(load, env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load(env=env)


def test_variables_for_tests_are_left_alone(load) -> None:
    assert load(env={"CANDLE_VLLM_TEST_DEVICE": "cpu"}) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CANDLE_VLLM_PROT=1\n", "unknown variable CANDLE_VLLM_PROT"),
        ("A=1\nCANDLE_VLLM_PORT\n", ".env, line 2: CANDLE_VLLM_PORT has no value"),
        ("A=1\n'unfinished\n", ".env, line 2: not a line of the form NAME=value"),
    ],
)
def test_mistakes_in_dotenv(load, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load(dotenv=text)


def test_models_file_by_alias_and_default(load, tmp_path: Path) -> None:
    for line in ("--m small", "", "--m default"):
        settings = load(line, models=MODELS)
        assert (settings.model, settings.weight_file, settings.served_model_name) == (
            "org/small",
            "small.gguf",
            ("small",),
        )
        assert (settings.max_model_len, settings.mem, settings.prefill_chunk_size) == (4096, 64, 256)
        assert settings.chat_template == tmp_path / "folder" / "small.jinja"
    assert load("--m near", models=MODELS).model == str(tmp_path / "folder" / "weights" / "near")
    assert load("--m small --f other.gguf", models=MODELS).weight_file == "other.gguf"
    assert load("--m org/other", models=MODELS).temperature is None
    assert load("--w dir", models=MODELS).model is None


def test_paths_in_params_are_relative_to_the_models_file(load, tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".candle-vllm"

    def of(params: str) -> Settings:
        return load(models=f"models: [{{name: a, hf_id: o/x, params: {{{params}}}}}]", in_home=True)

    assert of("mmproj: a.gguf").mmproj == folder / "a.gguf"
    specs = read_specs(of('lora_modules: [s=./a, \'{"name": "t", "path": "/b"}\']').lora_modules)
    assert [spec.path for spec in specs] == [str(folder / "a"), "/b"]
    for value, meant in {"packs": str(folder / "packs"), "/x": "/x", "on": "on", "off": "off", "'on'": "on"}.items():
        assert of(f"packed_cache: {value}").packed_cache == meant
    drafts = "speculative_config: {model: draft/small}"
    assert of(drafts).speculative_config == {"model": "draft/small"}
    (folder / "draft" / "small").mkdir(parents=True)
    assert of(drafts).speculative_config == {"model": str(folder / "draft" / "small")}
    assert of("speculative_config: {method: ngram}").speculative_config == {"method": "ngram"}
    assert of("speculative_config: {model: 5}").speculative_config == {"model": 5}  # refused by the engine


def test_a_stronger_source_replaces_rivals(load) -> None:
    settings = load("--m small --kv-fraction 0.5", models=MODELS)
    assert (settings.mem, settings.kv_fraction) == (None, 0.5)


def test_models_file_search_order(load, tmp_path: Path) -> None:
    load(models=MODELS)
    home = MODELS.replace("org/small", "org/home")
    assert load(models=home, in_home=True).model == "org/home"
    given = tmp_path / "folder" / "given.yaml"
    given.write_text(MODELS.replace("org/small", "org/given"))
    assert load(env={"CANDLE_VLLM_MODELS_CONFIG": "given.yaml"}).model == "org/given"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "default_model: small",
            "default_model: smal",
            "default_model 'smal' is not one of its models (did you mean small?)",
        ),
        ("default_model", "default_modle", "unknown key 'default_modle' (did you mean default_model?)"),
        ("temperature", "temprature", "unknown key 'temprature' in params (did you mean temperature?)"),
        ("temperature: 0.25", "port: 1", "unknown key 'port' in params"),
        ("temperature: 0.25", "idle_unload_secs: 1", "write it at the top of the file, not in params"),
        ("default_model: small", "idle_unload_secs: 10m", "idle_unload_secs must be a whole number, not '10m'"),
        ("temperature: 0.25", "temperature: hot", "temperature must be a number"),
        ("temperature: 0.25", "temperature: [1]", "temperature must be a number"),
        ("temperature: 0.25", "seed: true", "seed must be a whole number"),
        ("mem: 64", "mem: 64, kv_fraction: 0.2", "mem and kv_fraction both set the KV cache size"),
        ("hf_id: org/small", "local_path: a\n    hf_id: b", "give exactly one of hf_id and local_path"),
        ("hf_id: org/small", "hf_it: b", "unknown key 'hf_it' (did you mean hf_id?)"),
        ("hf_id: org/small", "model: b", "unknown key 'model'; known: name, hf_id, local_path"),
        ("name: near", "name: small", "two models are called 'small'"),
        ("- name: small", "- nam: small", "name of model 1 must be a text"),
        ("models:", "models: {", "not valid YAML"),
        ("temperature: 0.25", "temperature: !!bool foo", "not valid YAML"),
        ("temperature: 0.25", "temperature: !!map 3", "line 7: not valid YAML: expected a mapping node"),
        ("temperature: 0.25", "temperature: !!set [1]", "line 7: not valid YAML: expected a mapping node"),
        ("temperature: 0.25", "temperature: !!timestamp foo", "not valid YAML"),
        ("temperature: 0.25", 'temperature: !!float ""', "not valid YAML"),
        ("models:", "model:", "unknown key 'model' (did you mean models?)"),
    ],
)
def test_mistakes_in_the_models_file(load, old: str, new: str, message: str) -> None:
    assert old in MODELS
    with pytest.raises(UsageError, match=re.escape(message)):
        load(models=MODELS.replace(old, new))


def test_a_models_file_runs_no_code(load) -> None:
    with pytest.raises(UsageError, match="not valid YAML"):
        load(models="models: !!python/object/apply:os.system ['true']")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("0.0.0.0", ("0.0.0.0", 2000, "http://127.0.0.1:2000")),
        ("example.org:80", ("example.org", 80, "http://example.org:80")),
        ("[::1]:8000", ("::1", 8000, "http://[::1]:8000")),
        ("[::]", ("::", 2000, "http://[::1]:2000")),
        ("::1", ("::1", 2000, "http://[::1]:2000")),
        ("tcp://127.0.0.1", ("127.0.0.1", 2000, "http://127.0.0.1:2000")),
        ("http://localhost:9/", ("localhost", 9, "http://localhost:9")),
        ("unix:///run/x.sock", ("", 0, "unix:///run/x.sock")),
    ],
)
def test_host_forms(load, host: str, expected: tuple[str, int, str]) -> None:
    address = load(f"--h {host}").address
    assert (address.host, address.port, address.url) == expected


@pytest.mark.parametrize(
    "host", ["https://x", "http://x/path", "x:99999", "x:", "unix://relative", "ftp://x", "a b", "[::1", "x:1:2:z"]
)
def test_host_forms_that_are_none(host: str) -> None:
    with pytest.raises(UsageError, match="host"):
        Settings(host=host)


def test_the_stronger_port_wins(load) -> None:
    assert load("--h 0.0.0.0:8000", {"CANDLE_VLLM_PORT": "9000"}).address.port == 8000
    assert load("--p 9000", {"CANDLE_VLLM_HOST": "0.0.0.0:8000"}).address.port == 9000
    assert load("--p 8000 --h 0.0.0.0:8000").address.port == 8000


def test_hugging_face_token(load, tmp_path: Path) -> None:
    assert load("--hf-token hf_abc").hf_token == "hf_abc"
    assert load("--hf-token MINE", {"MINE": "xyz", "HF_TOKEN": "other"}).hf_token == "xyz"
    assert load("--hf-token MINE", dotenv="MINE=from_file\n").hf_token == "from_file"
    assert load(env={"HF_TOKEN": "plain"}).hf_token == "plain"
    (tmp_path / "token").write_text("in_file\n")
    assert load(f"--hf-token-path {tmp_path / 'token'}").hf_token == "in_file"


def test_options_of_a_part_are_checked_and_hide_secrets_as_settings_do() -> None:
    options = AccessOptions(api_key=("open-sesame",), host="unix:///tmp/x")
    assert repr(options) == f"AccessOptions(host='unix:///tmp/x', api_key={[HIDDEN]})"
    assert options.is_local
    with pytest.raises(UsageError, match="ssl_cert_reqs must be between 0 and 2, not 9"):
        ListenerOptions(ssl_cert_reqs=9)
    names = [{field.name for field in dataclasses.fields(kind)} for kind in Settings.__mro__[1:-2]]
    assert set().union(*names) == set(BY_NAME)
    assert all(len(each) < len(BY_NAME) for each in names)


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(UsageError, match="max_body_mb must be between 1 and 1024, not 0"):
        Settings(max_body_mb=0)
    with pytest.raises(UsageError, match="api_key must be"):
        Settings(api_key=("",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  - {name: default, local_path: x}\n", "cannot be called 'default'"),
        ("models:\n  - {name: a, name: b, local_path: x}\n", "the key 'name' appears twice"),
        ("models: []\nmodels: []\n", "line 2: .*the key 'models' appears twice"),
        ("models:\n- name: a\n  hf_id: {{ model }}\n", "line 3: not valid YAML: found unhashable key"),
        ("? [a, b]\n: c\n", "line 1: not valid YAML"),
        ("models:\n  - {name: a, local_path: x}\nmailbox: {url: mysql://x}\n", "models.yaml: mailbox must be sqlite"),
        ("models:\n  - {name: a, local_path: x}\nmailbox: {retention_secs: 5}\n", "needs a mailbox"),
        ("models:\n  - {name: a, local_path: x}\nparking_lot: {quue: {}}\n", "unknown key 'quue'"),
    ],
)
def test_models_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_settings(SettingsSource("the command line"), {}, folder=tmp_path, home=tmp_path)


def test_candle_vllm_s_limits_and_mailbox_are_read(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        "models: [{name: a, local_path: x}]\nidle_unload_secs: 60\nparking_lot:\n"
        "  pool: {max_queue_depth: 5}\n  limits: {max_queue_depth: 7, timeout_secs: 30}\n"
        "  mailbox: {backend: memory, retention_secs: 9}\n"
    )
    made = load_configuration(SettingsSource("the command line"), {}, folder=tmp_path, home=tmp_path)
    assert (made.settings.max_queued_requests, made.settings.request_timeout) == (7, 30)
    assert made.settings.idle_unload_secs == 60
    assert made.mailbox is not None
    assert made.mailbox.retention_secs == 9
    assert made.mailbox.url.endswith(".candle-vllm/mailbox.sqlite")


def test_null_sets_nothing_in_any_section(tmp_path: Path) -> None:
    def read(mailbox: str) -> Configuration:
        (tmp_path / "models.yaml").write_text(
            "models: [{name: a, local_path: x, adapters: [{name: t, path: p, scale: null, pinned: null}]}]\n"
            f"mailbox: {{{mailbox}}}\n"
        )
        return load_configuration(SettingsSource("the command line"), {}, folder=tmp_path, home=tmp_path)

    assert read("retention_secs: null").mailbox is None
    made = read("url: sqlite, retention_secs: null, webhook: null, webhook_allowed_hosts: null")
    assert made.mailbox is not None
    assert made.mailbox.retention_secs == 3600
    assert json.loads(made.settings.lora_modules[0])["scale"] == 0.0


def test_prompts_cannot_be_logged_without_the_log() -> None:
    with pytest.raises(UsageError, match="set log_requests as well"):
        Settings(log_prompts=True)
    assert Settings(log_prompts=True, log_requests=True).log_prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n- name: a\n  hf_id: x/y\n  parms: {}", "line 4: unknown key 'parms' (did you mean params?)"),
        ("models:\n- name: a\n  hf_id: x/y\n  params:\n    mem: 1\n    top_q: 1", "line 6: unknown key 'top_q'"),
        ("models:\n- name: a\n  hf_id: x/y\n  params:\n    mem: 1\n    top_p: 2", "line 6: top_p must be"),
        ("models:\n- name: a\n", "line 2: give exactly one of hf_id and local_path"),
        (
            "models:\n- name: a\n  hf_id: x/y\n  mmproj: z",
            "line 4: mmproj is a setting of the model: write it in params",
        ),
        ("models:\n- name: a\n  local_path: demo", "line 3: the demo model is no path: write hf_id: demo"),
        ("models:\n- {name: a, hf_id: x/y}\n- {name: a, hf_id: x/y}", "line 3: two models are called 'a'"),
        ("models: [{name: a, hf_id: x/y, params: []}]", "params must be a mapping"),
        (
            "models: [{name: a, hf_id: x/y, adapters: [{name: t, path: p}], params: {lora_modules: [s=q]}}]",
            "adapters and lora_modules are the same setting: give one",
        ),
        (
            "models:\n- name: a\n  hf_id: x/y\n  params:\n    tool_parser: hermes\n    tool_call_parser: mistral",
            "line 6: tool_call_parser and tool_parser are the same setting: give one",
        ),
        (
            "models: [{name: a, hf_id: x/y, adapters: [{name: t, lora_name: s, path: p}]}]",
            "adapters: an adapter has 'name' twice",
        ),
        ("default_model: b\nmodels:\n- {name: a, hf_id: x/y}", "line 1: default_model 'b'"),
        ("default_model: [a]\nmodels:\n- {name: a, hf_id: x/y}", "line 1: default_model ['a']"),
        ("models:\n- name: a\n  notes: 2026-02-30", "line 3: not valid YAML: day is out of range"),
        ("models: " + "{a: " * 3000, "nested too deeply"),
    ],
)
def test_a_wrong_models_yaml_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(UsageError) as refusal:
        read_models_file(tmp_path / "models.yaml")
    assert message in str(refusal.value)
