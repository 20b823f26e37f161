# SPDX-License-Identifier: MIT
"""Flags of other programs are answered with their name here, or with why there is none."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.core.loading.quantised import collected
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.command_line import flag_commands, parse, split_command
from candle_vllm.server.settings.commands import COMMANDS
from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.foreign_flags import COMMANDS as FOREIGN_COMMANDS
from candle_vllm.server.settings.foreign_flags import foreign_flags
from candle_vllm.server.settings.options import UsageError


def test_what_exists_here_is_not_in_the_table() -> None:
    spoken = {
        "run-batch",
        "bench serve",
        "bench throughput",
        "bench latency",
        "quantize",
        "imatrix",
        "perplexity",
    }  # commands that have flags as others call them; elsewhere these are answered
    known = {flag for flag, commands in flag_commands().items() if not spoken.issuperset(commands)}
    assert set(foreign_flags()) & {*known, "--version", "--help", "-h"} == set()
    assert set(FOREIGN_COMMANDS).isdisjoint(COMMANDS)


def test_every_format_of_checkpoints_is_a_value_of_vllms_flag() -> None:
    row = next(row for row in foreign_tables()["Flags"] if "--quantization" in row[0].split())
    assert {*collected("METHODS"), "gguf"} == {value.strip().rstrip(":") for value in row[1].split(";")}


def test_no_flag_stands_in_two_rows() -> None:
    told = [flag for flags, *_ in foreign_tables()["Flags"] for flag in flags.split()]
    assert len(told) == len(set(told))


def test_every_flag_that_an_answer_names_exists() -> None:
    answers = [*(row.answer for row in foreign_flags().values()), *FOREIGN_COMMANDS.values()]
    named = {flag for answer in answers for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", answer)}
    assert len(named) > 20
    assert named - {*flag_commands(), "--help", "--prompt"} == set()  # generate drops --prompt before its text


TRANSLATED: dict[str, dict[str, Any]] = {
    "--max_model_len 8K --gpu-memory-utilization=0.5": {"max_model_len": 8192, "gpu_memory_utilization": 0.5},
    "--no-enable-chunked-prefill": {"prefill_chunk_size": 0},
    "--max-model-len -1": {"max_model_len": None},
    "--port 1 Qwen/Qwen3-4B": {"port": 1, "model": "Qwen/Qwen3-4B"},
    "--served-model-name a b --api-key k1 k2": {"served_model_name": ("a", "b"), "api_key": ("k1", "k2")},
    "--api-key k1 --api-key k2": {"api_key": ("k1", "k2")},
    "-tp 1 -O3 --swap-space 4": {"tensor_parallel_size": 1},
    "--spec-type ngram-simple --spec-draft-n-max 64": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 31}
    },
    "--mcp-servers-config a.json --no-mmproj-offload --enable-offline-docs": {"mcp_config": Path("a.json")},
    "-tp 2 --num-shards 2": {"tensor_parallel_size": 2},
    "--num-nodes 2 --headless": {"nnodes": 2},
    "--worker-use-ray": {"distributed_executor_backend": "ray"},
    "-pp 2 -ep": {"pipeline_parallel_size": 2, "enable_expert_parallel": True},
    "--scheduling-policy priority --enable-log-requests": {"enable_request_priority": True, "log_requests": True},
    "--disable-log-requests --uvicorn-log-level critical": {"log_requests": False, "log_level": "error"},
    "--generation-config vllm": {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1},
    """--override-generation-config '{"temperature": 0.5, "top_k": 20}'""": {"temperature": 0.5, "top_k": 20},
    """--allowed-origins '["https://a.example", "*"]'""": {"cors_origin": ("https://a.example", "*")},
    "--uds /run/v.sock": {"host": "unix:///run/v.sock"},
    "-m a.gguf -c 4096 -ngl 99 -np 2 -t 4 --jinja --mlock -fa": {
        "model": "a.gguf", "max_model_len": 4096, "gpu_layers": 99, "max_num_seqs": 2, "threads": 4},
    "-ngl all --cpu-offload-gb 0": {"gpu_layers": 1024, "cpu_offload_gb": 0.0},
    "--n-gpu-layers auto": {"gpu_layers": None},
    "-ctk iq4_nl -ctv q5_1 -fa on": {"key_cache_dtype": "iq4_nl", "value_cache_dtype": "q5_1"},
    "-c 0 -ngl 0 -np -1 -fa auto --no-webui": {"max_model_len": None, "device": "cpu", "ui_server": False},
    "--speculative-config.method ngram --speculative-config.num-speculative-tokens=4": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    "--lora a/poems.gguf,b/tone --lora-scaled c.gguf:0.5": {"enable_lora": True, "lora_modules": (
        '{"name": "poems", "path": "a/poems.gguf", "scale": 1.0}', '{"name": "tone", "path": "b/tone", "scale": 1.0}',
        '{"name": "c", "path": "c.gguf", "scale": 0.5}')},
    "--enable-lora --lora-modules a=/x b=/y --max-loras 4 --max-cpu-loras 8 --max-lora-rank 16": {
        "enable_lora": True, "lora_modules": ("a=/x", "b=/y"), "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 16},
    "--enable-lora --lora-paths a=/x --max-loras-per-batch 4 --fully-sharded-loras": {
        "enable_lora": True, "lora_modules": ("a=/x",), "max_loras": 4},
    "--spec-type ngram-mod": {"speculative_config": {"method": "suffix"}},
    "--spec-type draft-mtp": {"speculative_config": {"method": "mtp"}},
    "-md head.gguf --spec-type draft-eagle3": {"speculative_config": {"method": "eagle3", "model": "head.gguf"}},
    "-md small.gguf --draft-max 6 --draft-min 1 --draft-p-min 0.4 --spec-type draft-simple": {"speculative_config": {
        "model": "small.gguf", "num_speculative_tokens": 6, "draft_min": 1, "draft_p_min": 0.4,
        "method": "draft_model"}},
    """--chat-template-kwargs '{"enable_thinking": false}'""": {
        "default_chat_template_kwargs": {"enable_thinking": False}},
    "-ncmoe 10": {"cpu_experts": 10},
    "--cpu-moe": {"cpu_experts": 1024},
    "--num-experts-offload-per-rank 0": {"cpu_experts": 0},
    "--num-experts-offload-per-rank 15": {},
    "-tp 2 -mg 0": {"tensor_parallel_size": 2, "device": "auto"},
    "--main-gpu 1": {"device": "cuda:1"},
    "--spec-method ngram --spec-tokens 4": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    """-sc '{"method": "suffix"}' --max-num-scheduled-tokens 512""": {
        "speculative_config": {"method": "suffix"}, "prefill_chunk_size": 512},
    "-mm tower.gguf --spec-default --media-path /images --cors-origins https://a.example": {
        "mmproj": Path("tower.gguf"), "speculative_config": {"method": "suffix"},
        "allowed_local_media_path": Path("/images"), "cors_origin": ("https://a.example",)},
    "--cors-origins localhost,http://b": {"cors_origin": (
        "http://localhost", "http://localhost:*", "http://127.0.0.1", "http://127.0.0.1:*", "http://[::1]",
        "http://[::1]:*", "http://b")},
    "--reasoning off": {"default_chat_template_kwargs": {"enable_thinking": False}},
    "--reasoning auto": {"default_chat_template_kwargs": {"enable_thinking": True}},
    "--pooling cls": {"pooling": "cls"},
    "--enforce-eager": {"cuda_graphs": False},
    "--no-enforce-eager --op-by-op": {"op_by_op": True},
    "--attention-backend TRITON_ATTN": {"attention_backend": "triton"},
    "--attention-backend flash-attn": {"attention_backend": "flash_attn"},
    "-mu https://a.example/b.gguf": {"model": "https://a.example/b.gguf"},
    """--limit-mm-per-prompt '{"image": {"count": 2}, "video": 0}'""": {"max_images": 2},
    """--limit-mm-per-prompt '{"image": {"width": 640}}' --mm-encoder-tp-mode data --mmproj-offload""": {},
    "--limit-mm-per-prompt.video 0 --limit-mm-per-prompt.image=16 --limit_mm_per_prompt.audio=0": {"max_images": 16},
    "--override-generation-config.temperature 0.5": {"temperature": 0.5},
    """--pooler-config '{"pooling_type": "MEAN"}'""": {"pooling": "mean"},
    "--reasoning-effort low": {"default_chat_template_kwargs": {"reasoning_effort": "low"}},
    "-dev CUDA1 --reasoning-format none": {"device": "cuda:1", "reasoning_parser": "none"},
    "-dev CUDA0,CUDA1 --models-max 2": {"device": "cuda:0,cuda:1", "max_loaded_models": 2},
    "-dev none --models-max 0": {"device": "cpu"},
    "--uds /tmp/a.sock --host 0.0.0.0": {"host": "unix:///tmp/a.sock"},
}  # fmt: skip


@pytest.mark.parametrize("line", TRANSLATED)
def test_what_flags_are_taken_for(line: str) -> None:
    source, _ = parse("serve", shlex.split(line))
    assert dict(source.values) == TRANSLATED[line]


def test_a_flag_without_effect_is_named() -> None:
    experts = "--num-experts-offload-per-rank"
    source, _ = parse("serve", ["-O3", "--swap-space", "4", "--jinja", experts, "8"])
    assert [remark.split(" has no effect here: ")[0] for remark in source.remarks] == ["-O3", "--swap-space", experts]
    assert parse("serve", [experts, "0"])[0].remarks == ()  # it is --cpu-experts 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tensor-parallel-size", "--tensor-parallel-size: expected one argument"),
        ("-ngl some", "--gpu-layers/--n-gpu-layers must be a whole number, not 'some'"),
        ("--pooling none", "--pooling must be one of mean, weighted_mean, cls, last, not 'none'"),
        ("""--pooler-config '{"normalize": true}'""", "may have a pooling_type and nothing else"),
        ("--allowed-origins *", "--allowed-origins must be a JSON list, not '*'"),
        (
            """--override-generation-config '{"max_tokens": 5}'""",
            "'max_tokens' is not one of these parameters with a number: temperature",
        ),
        ("""--override-generation-config '{"top_k": "a"}'""", "'top_k' is not one of these parameters with a number:"),
        ("--override-generation-config " + "[" * 99_999, "must be a JSON object"),
        ("--default-chat-template-kwargs []", "must be a JSON object, not []"),
        ("--default-chat-template-kwargs {a}", "must be a JSON object, not '{a}'"),
        ("--default-chat-template-kwargs " + "[" * 60_000, "must be a JSON object"),
        ("--scheduling-policy lifo", "--scheduling-policy lifo is not supported: requests have priorities with"),
        ("--speculative-config.method", "--speculative-config.method: expected one argument"),
        ("--speculative-config nothing", "must be a JSON object, not 'nothing'"),
        (
            """--speculative-config '{"method": "ngram"}' --draft-max 4""",
            "--speculative-config and --speculative-config.num_speculative_tokens are one setting: give one",
        ),
        ("--spec-type draft-dflash", "--spec-type draft-dflash is not supported: --speculative-config for other ways"),
        ("a b", "unexpected argument 'b'"),
        ("--port 1 chat", "unexpected argument 'chat': the command comes first"),
        ("--m a b", "unexpected argument 'b'"),
        ("--root-path models", "root_path 'models' must begin with a slash"),
    ],
)
def test_what_stands_for_nothing_is_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(**parse("serve", shlex.split(line))[0].values)
    assert message in str(caught.value)


def test_a_file_of_flags_stands_below_those_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: org/name\nport: 8000\nmax_model_len: 8K\ntensor-parallel-size: 1\nserved-model-name: [a, b]\n"
        "enable-prefix-caching: false\nenforce-eager: true\nkv-fraction: 0.5\nswap-space: 4\n"
        "override-generation-config: {temperature: 0.5}\nlora-modules:\n- {name: t, path: /t}\n- s=/s\n"
    )
    source, own = parse("serve", ["--config", str(path), "--port", "1", "--mem", "64", "other/name"])
    assert own == {}
    assert dict(source.values) == {
        "model": "other/name", "tensor_parallel_size": 1,
        "port": 1, "mem": 64, "max_model_len": 8192, "served_model_name": ("a", "b"),
        "enable_prefix_caching": False, "cuda_graphs": False, "temperature": 0.5,
        "lora_modules": ('{"name": "t", "path": "/t"}', "s=/s")}  # fmt: skip
    assert source.given_as["port"] == "--p"
    assert source.given_as["max_model_len"] == f"--max-model-len in {path}"
    assert [remark.split()[0] for remark in source.remarks] == ["--swap-space"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "serve.yaml must be a mapping"),
        ("port: [", "serve.yaml, line 1: not valid YAML"),
        ("port: 1\nport: 2", "serve.yaml, line 2: not valid YAML: the key 'port' appears twice"),
        ("port:", "serve.yaml: port has no value"),
        ("prot: 1", "serve.yaml: unknown flag --prot"),
        ("port: x", "serve.yaml: --p/--port must be a whole number"),
        ("decode-context-parallel-size: 2", "serve.yaml: --decode-context-parallel-size 2 is not supported"),
        ("trust-remote-code: false\nmax-loras: false", "serve.yaml: max-loras: leave it out"),
        ("config: a.yaml", "serve.yaml: config can only be set on the command line"),
        ("help: true", "serve.yaml: help can only be set on the command line"),
    ],
)
def test_a_wrong_file_of_flags_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse("serve", ["--config", str(tmp_path / "serve.yaml")])
    assert message in str(caught.value)
    assert str(caught.value).count("serve.yaml") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--decode-context-parallel-size", "2"],
            "--decode-context-parallel-size 2 is not supported: a model is divided among GPUs by "
            "--tensor-parallel-size",
        ),
        (
            ["-ot", "exps=CPU"],
            "weights outside the GPU are set by --cpu-experts, --cpu-offload-gb and --gpu-layers",
        ),
        (["bench", "--alias", "a"], "--alias is called --served-model-name here (of `candle-vllm serve, "),
        (["generate", "hi", "--log-jsonl"], "--log-jsonl is called --log-format json here"),
        (["create", "llama3"], "there is no command 'create': several models and their settings: models.yaml"),
        (["bench", "model.gguf"], "a model is named with --m model.gguf"),
        (["push", "demo"], "there is no command 'push': models are not uploaded"),
        (["show", "demo", "--modelfile"], "--modelfile is not supported: there is no Modelfile"),
        (["serve", "--samplers", "top_k"], "--samplers is not supported: samplers have a fixed order"),
        (["serve", "--logits-processors", "a:B"], "--logits-processors is not supported: a server has no logits"),
        (
            ["serve", "--system", "Hi"],
            "--system does not apply to `candle-vllm serve`, only to `candle-vllm generate, chat, agent, run`",
        ),
        (["generate", "hi", "--pooling", "cls"], "--pooling does not apply to `candle-vllm generate`, only to"),
    ],
)
def test_the_answer_has_the_name_here(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*split_command(arguments))
    assert message in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("serve Qwen/Qwen3-4B", {"model": "Qwen/Qwen3-4B"}),
        ("serve demo -p 0", {"model": "demo", "port": 0}),
        ("serve -m model.gguf", {"model": "model.gguf"}),
        ("chat -m demo", {"model": "demo"}),
        ("config demo -p 0", {"model": "demo", "port": 0}),
    ],
)
def test_short_forms_are_understood(line: str, settings: dict[str, object]) -> None:
    source, _ = parse(*split_command(line.split()))
    assert dict(source.values) == settings


def test_values_and_texts_are_no_flags() -> None:
    _, own = parse("generate", ["--no-display-prompt", "--simple-io", "--", "-ngl"])
    assert own["prompt"] == "-ngl"
    _, own = parse("generate", ["-- SQL: user_id of all_users", "--system", "--a_b c"])
    assert own == {"prompt": "-- SQL: user_id of all_users", "system": "--a_b c"}
    given, _ = parse("serve", ["--mcp-args=--parallel,3"])
    assert given.values["mcp_args"] == "--parallel,3"


def test_a_flag_of_another_command_is_taken_where_the_answer_is_right_without_it() -> None:
    source, _ = parse("serve", ["-n", "128", "--repeat-penalty", "1.1", "--trust-remote-code"])
    assert dict(source.values) == {"repetition_penalty": 1.1}
    assert [remark.split(" has no effect here: ")[0] for remark in source.remarks] == ["-n", "--trust-remote-code"]
    assert source.remarks[0].endswith("; for a server, max_tokens of each request")
    generating, own = parse("generate", ["hi", "-n", "128"])
    assert (own["max_tokens"], generating.remarks) == (128, ())


def test_eager_steps_without_torch_are_compiled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.gguf").touch()
    model = str(tmp_path / "a.gguf")
    two = {"tensor_parallel_size": 2}
    for there, more, eager in (
        *((object(), {}, True), (None, {}, False), (None, two, False)),
        (None, {**two, "device": "cpu"}, True),  # rank processes, which torch computes; the library names the command
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name, found=there: found)
        assert engine_config(Settings(model=model, op_by_op=True, **more)).op_by_op is eager
    assert [record.message.split(":")[0] for record in caplog.records] == ["op_by_op has no effect"] * 2


def test_chatml_is_a_template_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    text = engine_config(Settings(model=str(tmp_path / "a.gguf"), chat_template=Path("chatml"))).chat_template
    assert text is not None
    template = ChatTemplate(text, {})
    rendered = template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", ["{{ messages }}", "{% for each in messages %}a//{{ each.content }}\n{% endfor %}"])
def test_a_template_may_stand_on_the_command_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.gguf").touch()
    source, _ = parse("serve", ["--model", str(tmp_path / "a.gguf"), "--chat-template", text])
    assert engine_config(Settings(**source.values)).chat_template == text
