"""Flags of other programs are answered with their name here, or with why there is none."""

from __future__ import annotations

import re

import pytest

from candle_vllm.server.settings import foreign_flags as foreign_module
from candle_vllm.server.settings.command_line import SHORT, flag_commands, parse, split_command
from candle_vllm.server.settings.foreign_flags import COMMANDS as FOREIGN_COMMANDS
from candle_vllm.server.settings.foreign_flags import foreign_flags
from candle_vllm.server.settings.options import COMMANDS, UsageError

# What their own lists of flags have, as far as people write them.
VLLM = """
--host --port --api-key --served-model-name --dtype --max-model-len --gpu-memory-utilization --kv-cache-memory-bytes
--max-num-seqs --max-num-batched-tokens -tp -pp -dp --tensor-parallel-size --pipeline-parallel-size
--data-parallel-size --enable-expert-parallel -q --quantization --load-format --kv-cache-dtype --block-size
--enable-prefix-caching --prefix-caching-hash-algo --kv-offloading-size --kv-offloading-backend
--enable-chunked-prefill --scheduling-policy --async-scheduling --stream-interval --enforce-eager -O3
--compilation-config --speculative-config --enable-lora --max-loras --max-lora-rank --lora-modules --seed
--generation-config --chat-template --chat-template-content-format --default-chat-template-kwargs
--trust-request-chat-template --enable-auto-tool-choice --tool-call-parser --tool-parser-plugin
--exclude-tools-when-tool-choice-none --reasoning-parser --max-logprobs --logprobs-mode --allowed-media-domains
--allowed-local-media-path --trust-remote-code --enable-prompt-tokens-details --enable-per-request-metrics
--enable-server-load-tracking --enable-force-include-usage --enable-tokenizer-info-endpoint
--return-tokens-as-token-ids --fingerprint-mode --allowed-origins --allowed-methods --allowed-headers
--allow-credentials --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers --enable-ssl-refresh
--root-path --middleware --enable-request-id-headers --disable-fastapi-docs --uvicorn-log-level
--disable-uvicorn-access-log --disable-access-log-for-endpoints --h11-max-incomplete-event-size
--h11-max-header-count --api-server-count --shutdown-timeout --max-num-queued-reqs --max-num-queued-tokens
--enable-log-requests --enable-log-outputs --max-log-len --log-config-file --otlp-traces-endpoint
--kv-cache-metrics --enable-sleep-mode --uds --config --tokenizer --revision --download-dir --cpu-offload-gb
"""
LLAMA = """
-m --model -t --threads -tb --threads-batch -C --cpu-mask --prio --poll -c --ctx-size -n --predict --n-predict -b
--batch-size -ub --ubatch-size --keep --swa-full -fa --flash-attn --no-perf -e --escape --rope-scaling --rope-scale
--rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor -nkvo --no-kv-offload --no-repack -ctk
--cache-type-k -ctv --cache-type-v --defrag-thold --rpc --mlock --no-mmap --numa -dev --device --list-devices -ot
--override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe -ngl --gpu-layers --n-gpu-layers -sm --split-mode -ts
--tensor-split -mg --main-gpu -fit --fit --check-tensors --override-kv --no-op-offload --lora --lora-scaled
--control-vector -mu --model-url -hf --hf-repo -hff --hf-file -hft --hf-token --log-disable --log-file
--log-colors -v --verbose --offline -lv --verbosity --log-prefix --log-timestamps --samplers -s --seed
--sampling-seq --ignore-eos --temp --temperature --top-k --top-p --min-p --typical --repeat-last-n --repeat-penalty
--presence-penalty --frequency-penalty --dry-multiplier --mirostat -l --logit-bias --grammar --grammar-file -j
--json-schema --pooling -cb --cont-batching -nocb --mmproj -a --alias --host --port --path --api-prefix --embedding
--reranking --api-key --api-key-file --ssl-key-file --ssl-cert-file --chat-template-kwargs -to --timeout
--threads-http --cache-reuse --metrics --slots --props --jinja --reasoning-format --reasoning-budget
--chat-template --chat-template-file --slot-prompt-similarity --model-draft -md --draft-max --draft-min -np
--parallel -p --prompt -f --file -sys --system-prompt -cnv --conversation -i --interactive -r --reverse-prompt
--prompt-cache --no-webui
"""
OLLAMA = "--verbose --format --keepalive --insecure --nowordwrap --think --hidethinking --quantize"
RUST = """
--m --w --f --hf-token --hf-token-path --h --p --verbose --max-num-seqs --block-size --dtype --isq --cpu --mem
--kv-fraction --mamba-fraction --kvcache-mem-cpu --record-conversation --d --holding-time --multithread --log
--temperature --top-p --min-p --top-k --frequency-penalty --presence-penalty --prefill-chunk-size --kvcache-dtype
--disable-prefix-cache --prefix-cache-max-tokens --disable-cuda-graph --ui-server --mcp-command --mcp-args
--mcp-config --enforce-parser --yarn-scaling-factor --num-nodes --node-rank --master-addr --master-port
--max-gen-tokens --prefix-cache --fp8-kvcache --queue-size --request-timeout --models-config --enable-vision
--vision-model-path --vision-device --vision-dtype --prompt-cache --prompt-cache-backend --prompt-cache-path
--prompt-cache-redis-url --prompt-cache-ttl --prompt-cache-max-prefixes --prompt-cache-min-length
--num-experts-offload-per-rank --kvcache-compression-bits --kvcache-compression-policy
"""


@pytest.mark.parametrize("theirs", [VLLM, LLAMA, OLLAMA, RUST], ids=["vllm", "llama", "ollama", "rust"])
def test_every_flag_of_theirs_exists_or_is_answered(theirs: str) -> None:
    known = {*flag_commands(), *SHORT, "--version", "--help", "-h"}
    assert [flag for flag in theirs.split() if flag not in known and flag not in foreign_flags()] == []


def test_what_exists_here_is_not_in_the_table() -> None:
    spoken = {"run-batch"}  # commands that have flags as others call them; elsewhere these are answered
    known = {flag for flag, commands in flag_commands().items() if not spoken.issuperset(commands)}
    assert set(foreign_flags()) & {*known, "--version", "--help", "-h"} == set()
    assert set(FOREIGN_COMMANDS).isdisjoint(COMMANDS)


def test_no_flag_stands_in_two_rows() -> None:
    told = [flag for flag, _ in foreign_module._told()]
    assert len(told) == len(set(told))


def test_every_flag_that_an_answer_names_exists() -> None:
    answers = [*foreign_flags().values(), *FOREIGN_COMMANDS.values()]
    named = {flag for answer in answers for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", answer)}
    assert len(named) > 20
    assert named - {*flag_commands(), "--help"} == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tensor-parallel-size", "2"],
            "--tensor-parallel-size is not needed here",
        ),
        (["-ngl", "99"], "a model lies whole on a GPU or on the CPU (--device)"),
        (["--ctx-size=4096"], "--ctx-size is called --max-model-len here"),
        (["--gpu-memory-fraction", "0.9"], "is called --gpu-memory-utilization here"),
        (["-hf", "org/name"], "-hf is called --m here"),
        (
            ["generate", "hi", "--n-predict", "5"],
            "--n-predict is called --max-tokens here",
        ),
        (
            ["-n", "5"],
            "is called --max-tokens here (of `candle-vllm generate, chat, agent`); clients of a server send max_tokens",
        ),
        (["--log-jsonl"], "--log-jsonl is called --log-format json here"),
        (["run", "llama3"], "there is no command 'run': to talk with a model: candle-vllm chat"),
        (["serve", "--p", "0", "Qwen/Qwen3-4B"], "a model is named with --m Qwen/Qwen3-4B"),
        (["chat", "model.gguf"], "a model is named with --m model.gguf"),
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
    ],
)
def test_short_forms_are_understood(line: str, settings: dict[str, object]) -> None:
    source, _ = parse(*split_command(line.split()))
    assert dict(source.values) == settings


def test_values_and_texts_are_no_flags() -> None:
    _, own = parse("generate", ["--", "-ngl"])
    assert own["prompt"] == "-ngl"
    given, _ = parse("serve", ["--mcp-args=--parallel,3"])
    assert given.values["mcp_args"] == "--parallel,3"
