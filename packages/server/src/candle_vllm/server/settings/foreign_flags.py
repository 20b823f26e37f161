# SPDX-License-Identifier: MIT
"""Flags and commands of vLLM, llama.cpp, Ollama and candle-vllm that are called otherwise here, or are not needed.

A row is the flags, the answer, and what they are taken for. The answer is a flag that does the same, with what else
there is to say, or a sentence that says why there is none. What exists here under that very name is not in the table;
a test sees to that, and another that docs/coming-from-vllm.md says what the rows say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.arguments import NO_CODE

Becomes = str | Callable[[str], list[str]]
ANY = "*"


class Row(NamedTuple):
    """What is made of foreign flags.

    Attributes:
        flags: their names.
        answer: what is said of them.
        becomes: the arguments that stand for each value: a text, in which `{}` is the value and which may be empty
            where it is so anyway, or what makes them (ValueError: why not). "" is the flag without a value, `ANY` every
            other value; a value that is not there is refused with the answer.
        idle: what is taken has no effect, and a start says so.
    """

    flags: str
    answer: str
    becomes: Mapping[str, Becomes] = {}
    idle: bool = False


def _called(flags: str, ours: str, more: str = "", **others: str) -> Row:
    """Flags with a value that are called otherwise here; `others` are values of another meaning (`_1` is -1)."""
    values = {name.replace("_", "-"): text for name, text in others.items()}
    return Row(flags, ours + more, {ANY: f"{ours} {{}}", **values})


def _so(flags: str, answer: str) -> Row:
    """Switches for what is always so."""
    return Row(flags, answer, {"": ""})


def _idle(flags: str, answer: str, values: bool = False) -> Row:
    """Flags that change nothing here, and no answer."""
    return Row(flags, answer, {ANY: ""} if values else {"": ""}, idle=True)


def _only(flags: str, answer: str, *values: str) -> Row:
    """Flags of which some values are how it is here."""
    return Row(flags, answer, dict.fromkeys(values, ""))


def _origins(text: str) -> list[str]:
    """`--allowed-origins '["https://a.example"]'`."""
    return [argument for origin in _json(text, list) for argument in ("--cors-origin", str(origin))]


_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _generation(text: str) -> list[str]:
    """`--override-generation-config '{"temperature": 0.5}'`."""
    given = _json(text, dict)
    for name, value in given.items():
        if name not in _GENERATION or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{str(name)[:40]!r} is none of the numbers {', '.join(_GENERATION)}")
    return [argument for name, value in given.items() for argument in ("--" + name.replace("_", "-"), str(value))]


def _json(text: str, kind: type[Any]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"must be a JSON {'list' if kind is list else 'object'}, not {text!r:.60}")
    return value


def _socket(path: str) -> list[str]:
    return ["--host", f"unix://{Path(path).expanduser().absolute()}"]


def _device(text: str) -> list[str]:
    """llama.cpp's names of devices: CUDA0, none."""
    name = text.lower()
    return ["--device", f"cuda:{name[4:]}" if name.startswith("cuda") and name[4:].isdecimal() else
            {"none": "cpu"}.get(name, text)]  # fmt: skip


def _images(text: str) -> list[str]:
    """vLLM's `--limit-mm-per-prompt`: a JSON object of counts; those of video and audio may only be 0."""
    try:
        given = json.loads(text)
        counts = {kind: limit.get("count", 0) if isinstance(limit, dict) else limit for kind, limit in given.items()}
    except (ValueError, AttributeError):
        raise ValueError('must be a JSON object of counts, as {"image": 4}') from None
    other = next((kind for kind, count in counts.items() if kind != "image" and count != 0), None)
    if other is not None:
        raise ValueError(f"has {other!r:.40}: of what is not text, models read images alone")
    return ["--max-images", str(counts["image"])] if "image" in counts else []


def _adapters(text: str) -> list[str]:
    """`--lora F[,F]`: adapters that count where a request says nothing, each called after its file."""
    return [argument for path in text.split(",") for argument in _adapter(path, 1.0)]


def _scaled(text: str) -> list[str]:
    """`--lora-scaled F:S[,F:S]`."""
    given = [each.rpartition(":") for each in text.split(",")]
    try:
        return [argument for path, _, scale in given for argument in _adapter(path, float(scale))]
    except ValueError:
        raise ValueError(f"must be FILE:SCALE, not {text!r:.60}") from None


def _adapter(path: str, scale: float) -> list[str]:
    if not path:
        raise ValueError("has no file before the scale")
    given = {"name": Path(path).stem if path.endswith(".gguf") else Path(path).name, "path": path, "scale": scale}
    return ["--enable-lora", "--lora-modules", json.dumps(given)]


_REPLICAS = (
    "--data-parallel-size starts all replicas on this machine, behind one address; on several machines start a server "
    "on each, with a proxy before them"
)
_ONE_DEVICE = (
    "a model is divided among GPUs by --tensor-parallel-size and --pipeline-parallel-size, those of several machines "
    "with --nnodes or by Ray, and in no other way"
)
_WHOLE = "what of a model is not on its GPU is said by --cpu-experts, --cpu-offload-gb and --gpu-layers"
_DRAFTS = "--speculative-config says how tokens are guessed"
_OWN = "the kernels are this project's own and chosen for the machine"
_MAPPED = "weights are mapped while they are loaded, and then lie in memory in the kernels' order"
_REQUEST = "it is a field of each request"
_ALWAYS = "it is always so"
_STORED = "the checkpoint says how it is quantised, and that counts; --isq quantises plain weights"
_PRIORITY = "priorities are for servers with --enable-request-priority, and else requests are served in their order"
_LOGGED = "the log goes to standard error: 2> FILE keeps it; --log-format json is for programs"
_LEVEL = "--log-level"
_NO_ACCESS_LOG = "nothing of it is logged"

ROWS: tuple[Row, ...] = (
    # ---- the model and its files
    _called("--hf-repo -hf -hfr --model-path --model-id --model-name", "--m"),
    _called("-hff --hf-file", "--f"),
    _called("-hft", "--hf-token"),
    Row("-mu --model-url -dr --docker-repo", "--m, with a Hugging Face id or a file that you have downloaded"),
    _called("-a --alias", "--served-model-name"),
    Row("--models-dir --models-preset --models-max --models-autoload --no-models-autoload",
        "--models-config, with models.yaml; --max-loaded-models bounds how many stay"),
    Row("-q --quantization", _STORED, dict.fromkeys((
        "awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "fp8", "mxfp4", "modelopt", "modelopt_fp4",
        "gguf"), ""), idle=True),
    Row("--quantize", "--isq, or candle-vllm quantize, which writes a file"),
    Row("--trust-remote-code", NO_CODE),
    _so("--no-trust-remote-code", NO_CODE),
    _only("--tokenizer-mode --config-format --model-impl", "the model's files say it", "auto", "hf"),
    Row("--tokenizer-revision --hf-config-path --hf-overrides --override-kv --skip-tokenizer-init --code-revision",
        "the model's files say it; --tokenizer names another folder"),
    Row("--generation-config", "auto is the model's generation_config.json, vllm is none: --temperature 1, --top-p 1, "
        "--top-k 0, --min-p 0 and --repetition-penalty 1 stand above it",
        {"auto": "", "vllm": "--temperature 1 --top-p 1 --top-k 0 --min-p 0 --repetition-penalty 1"}),
    Row("--override-generation-config", "--temperature, --top-p, --top-k, --min-p and --repetition-penalty",
        {ANY: _generation}),
    Row("--runner --task --convert", "one server answers chat, embeddings and scores, as far as the model can",
        {ANY: ""}),
    _so("--embedding --embeddings --rerank --reranking",
        "one server answers chat, embeddings and scores, as far as the model can"),
    Row("--pooling --override-pooler-config --pooler-config --embd-normalize",
        "the model's files say how vectors are made"),
    Row("--lora", "--lora-modules, with --enable-lora: NAME=FILE, and its scale", {ANY: _adapters}),
    Row("--lora-scaled", "--lora-modules, with --enable-lora: NAME=FILE, and its scale", {ANY: _scaled}),
    _called("--lora-paths", "--lora-modules", ", with NAME=PATH"),
    _called("--max-loras-per-batch", "--max-loras"),
    _called("--max-loaded-loras", "--max-cpu-loras"),
    _idle("--fully-sharded-loras", "adapters lie whole beside the model"),
    Row("--control-vector --control-vector-scaled --control-vector-layer-range", "there are no control vectors"),
    _so("--enable-vision --mmproj-auto", "a model that sees takes images by itself"),
    Row("--limit-mm-per-prompt", "--max-images", {ANY: _images}),
    Row("--no-mmproj --language-model-only", "--max-images 0", {"": "--max-images 0"}),
    Row("--mmproj-url --image --video --audio",
        "images come with requests; --mmproj has what a model sees by"),
    Row("--image-min-tokens --image-max-tokens",
        "--mm-processor-kwargs bounds an image's size in pixels: '{\"min_pixels\": 65536, \"max_pixels\": 1048576}'"),
    Row("--mmproj-offload --no-mmproj-offload --mm-encoder-tp-mode --vision-device --vision-dtype",
        "what a model sees by computes where the model does"),
    # ---- devices and memory
    Row("-ngl --num-gpu", "--gpu-layers, and 0 is --device cpu",
        {"0": "--device cpu", ANY: "--gpu-layers {}"}),
    _called("-ncmoe --n-cpu-moe", "--cpu-experts", ", layers whose experts the CPU computes"),
    Row("-cmoe --cpu-moe", "--cpu-experts all", {"": "--cpu-experts all"}),
    Row("--num-experts-offload-per-rank", "--cpu-experts counts layers whose experts the CPU computes, and not experts "
        "of each layer; auto is as many as do not fit", {"0": "--cpu-experts 0", ANY: "--cpu-experts auto"}),
    Row("-ot --override-tensor -ncffn --n-cpu-ffn --moe-cache-mib -nkvo --no-kv-offload", _WHOLE),
    _only("--kv-offloading-backend", "--kv-offloading-size is this project's own; --prompt-cache-path and "
          "--prompt-cache-url keep blocks elsewhere", "native"),
    _so("-kvo --kv-offload --op-offload", _ALWAYS),
    _idle("--no-op-offload --no-host", _WHOLE),
    _idle("-fit --fit -fitt --fit-target -fitc --fit-ctx",
          "a context that was not asked for shrinks to what fits", values=True),
    _idle("--swap-space --kvcache-mem-cpu", "a request that is put off is computed again, not swapped", values=True),
    Row("-dev", "--device", {ANY: _device}),
    Row("-mg --main-gpu", "--device cuda:N; 0 is auto", {"0": "--device auto", ANY: "--device cuda:{}"}),
    Row("--list-devices", "candle-vllm config shows the device that is taken"),
    _only("-dcp --decode-context-parallel-size", _ONE_DEVICE, "1"),
    _called("--num-nodes", "--nnodes"),
    _idle("--headless", "a node whose --node-rank is not 0 serves nothing anyway"),
    Row("--worker-use-ray", "--distributed-executor-backend ray", {"": "--distributed-executor-backend ray"}),
    _called("-tp --num-shards", "--tensor-parallel-size"),
    _called("-pp --pp-size", "--pipeline-parallel-size"),
    Row("-ep", "--enable-expert-parallel", {"": "--enable-expert-parallel"}),
    _called("-dp --dp-size", "--data-parallel-size"),
    _called("-dpl --data-parallel-size-local", "--data-parallel-size", ": all replicas are on this machine"),
    _only("-dpb --data-parallel-backend", _REPLICAS, "mp"),
    _only("-dpn --data-parallel-rank -dpr --data-parallel-start-rank", _REPLICAS, "0"),
    Row("-dpa --data-parallel-address -dpp --data-parallel-rpc-port -dph --data-parallel-hybrid-lb -dpe "
        "--data-parallel-external-lb -dpm --data-parallel-multi-port-external-lb", _REPLICAS),
    _idle("--load-balance-method", "requests go where their beginning is cached, unless others wait there",
          values=True),
    _only("-n-gpu", _ONE_DEVICE, "0"),
    _only("-sm --split-mode", "--tensor-parallel-size N divides every matrix among N GPUs", "none"),
    Row("-ts --tensor-split --rpc", _ONE_DEVICE),
    _idle("--disable-custom-all-reduce --multithread", _ONE_DEVICE),
    _called("--gpu-memory-fraction", "--gpu-memory-utilization"),
    _called("--max-seq-len --max-model-length -c --ctx-size --num-ctx", "--max-model-len",
            **{"0": "--max-model-len auto"}),
    _called("-ctk --cache-type-k", "--key-cache-dtype", f16="--key-cache-dtype auto"),
    _called("-ctv --cache-type-v", "--value-cache-dtype", f16="--value-cache-dtype auto"),
    Row("--calculate-kv-scales", "a checkpoint's own scales are used with --kv-cache-dtype fp8"),
    _idle("--kvcache-compression-bits --kvcache-compression-policy --kvcache-compression-threshold-tokens "
          "--kvcache-compression-free-block-pct",
          "the cache is not compressed; --kv-cache-dtype q8_0 halves it, on a GPU fp8", values=True),
    _idle("--mamba-fraction", "states have a pool of their own: set --state-cache-gb", values=True),
    Row("-fa --flash-attn --use-flash-attn", "attention never keeps its whole table of scores; --attention-backend "
        "chooses among those of a GPU", {"": "", "on": "", "auto": "", "1": "", "true": ""}),
    _idle("--mlock --no-mmap --mmap --direct-io -dio --no-direct-io --repack -nr --no-repack", _MAPPED),
    _idle("-lm --load-mode -lzm --lazy-mode --max-parallel-loading-workers", _MAPPED, values=True),
    _idle("-tb --threads-batch", "--threads is for prompts and answers", values=True),
    _called("-t --num-thread --n-threads", "--threads", _1=""),
    Row("-C --cpu-mask -Cr --cpu-range --cpu-strict -Cb --cpu-mask-batch -Crb --cpu-range-batch --cpu-strict-batch",
        "start it under taskset or numactl: threads are as many as the CPUs that it may use"),
    Row("--numa", "--cpu-ranks divides threads and memory among the nodes; which are used, taskset or numactl says",
        {"distribute": "", "numactl": ""}),
    Row("--prio --prio-batch", "start it under nice"),
    _idle("--poll --poll-batch", "threads spin for a fraction of a millisecond and then sleep", values=True),
    _so("--check-tensors", "every number of a file's head is checked before it is used"),
    _so("--no-context-shift --kv-unified -kvu", "the cache is in blocks that all requests share, which no model "
        "shifts; a context that is full ends the answer"),
    Row("--swa-full --defrag-thold -dt --keep --context-shift -ctxcp --ctx-checkpoints --swa-checkpoints --cache-ram "
        "-cram --no-kv-unified --num-gpu-blocks-override --disable-sliding-window",
        "the cache is in blocks, which no model shifts or defragments; a context that is full ends the answer"),
    Row("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor "
        "--yarn-attn-factor --yarn-beta-slow --yarn-beta-fast --rope-theta",
        "--yarn-scaling-factor, for a longer context; else the model's files say it"),
    # ---- scheduling
    _called("-np --parallel --num-parallel --max-concurrency", "--max-num-seqs", _1=""),
    _called("-ub --ubatch-size", "--prefill-chunk-size", ", which is what a step computes at most"),
    _idle("-b --batch-size", "-ub, which is --prefill-chunk-size, says what a step computes", values=True),
    _so("-cb --cont-batching --enable-chunked-prefill --async-scheduling --disable-frontend-multiprocessing "
        "--use-v2-block-manager",
        "requests join and leave at every step, long prompts come in chunks, and steps of a GPU overlap"),
    Row("-nocb --no-cont-batching",
        "requests join and leave at every step, and long prompts come in chunks"),
    _idle("--holding-time", "requests join and leave at every step", values=True),
    Row("--no-enable-chunked-prefill", "--prefill-chunk-size 0, which cuts no prompt", {"": "--prefill-chunk-size 0"}),
    _idle("--no-async-scheduling", "steps of a GPU overlap; no answer depends on it"),
    Row("--scheduling-policy", _PRIORITY, {"fcfs": "", "priority": "--enable-request-priority"}),
    _only("--num-scheduler-steps --max-num-partial-prefills --max-long-partial-prefills",
          "requests join and leave at every step", "1"),
    _called("--max-num-queued-reqs --max-queue", "--max-queued-requests"),
    Row("--max-num-queued-tokens", "--max-queued-requests, which counts sequences"),
    _so("--cache-prompt", "what prompts begin with is kept in the KV cache itself"),
    Row("--no-cache-prompt", "--disable-prefix-cache", {"": "--disable-prefix-cache"}),
    _only("--prefix-caching-hash-algo", "blocks are known by SHA-256, and nothing else", "sha256"),
    _only("--cache-reuse", "only what prompts begin with is kept", "0"),
    _idle("--prompt-cache", "what prompts begin with is kept in the KV cache itself; --disable-prefix-cache turns "
          "that off"),
    _called("--prompt-cache-redis-url", "--prompt-cache-url"),
    _idle("--prompt-cache-backend --prompt-cache-ttl "
          "--prompt-cache-max-prefixes --prompt-cache-min-length --prefix-cache-max-tokens",
          "what prompts begin with is kept in the KV cache itself; --disable-prefix-cache turns that off",
          values=True),
    Row("--prompt-cache-all --prompt-cache-ro --prefix-cache --prefix-cache-retention-interval",
        "what prompts begin with is kept in the KV cache itself; --disable-prefix-cache turns that off"),
    Row("--slot-save-path", "--prompt-cache-path, which keeps what prompts begin with by itself"),
    _idle("--slot-prompt-similarity -sps", "there are no slots: blocks are shared by all requests", values=True),
    Row("--spec-type", f"{_DRAFTS} by what: draft-simple, draft-eagle3, draft-mtp, ngram-simple, ngram-mod or none", {
        "none": "--speculative-config.method none", "ngram-simple": "--speculative-config.method ngram",
        "ngram-mod": "--speculative-config.method suffix",
        "draft-simple": "--speculative-config.method draft_model",
        "draft-eagle3": "--speculative-config.method eagle3", "draft-mtp": "--speculative-config.method mtp"}),
    _called("-md --model-draft --spec-draft-model -hfd --hf-repo-draft --spec-draft-hf", "--speculative-config.model"),
    _called("--draft --draft-n --draft-max --spec-draft-n-max --num-speculative-tokens",
            "--speculative-config.num_speculative_tokens"),
    _called("--draft-min --draft-n-min --spec-draft-n-min", "--speculative-config.draft_min"),
    _called("--draft-p-min --spec-draft-p-min", "--speculative-config.draft_p_min"),
    Row("-ngld --gpu-layers-draft -devd --device-draft", "the model of drafts lies where the other one does"),
    _idle("-td --threads-draft", "the threads of the model compute drafts as well: --threads", values=True),
    Row("--spec-decode -cd --ctx-size-draft -ctkd --cache-type-k-draft -ctvd --cache-type-v-draft --spec-draft-type-k "
        "--spec-draft-type-v -lcs --lookup-cache-static -lcd --lookup-cache-dynamic", _DRAFTS),
    _idle("-O0 -O1 -O2 -O3", f"{_OWN}; --disable-cuda-graph and --enforce-eager turn graphs off"),
    _idle("-O --optimization-level --compilation-config --max-seq-len-to-capture",
          f"{_OWN}; --disable-cuda-graph and --enforce-eager turn graphs off", values=True),
    Row("--cudagraph-capture-sizes", f"{_OWN}; --disable-cuda-graph and --enforce-eager turn graphs off"),
    _only("--stream-interval", "every token is sent when it is there", "1"),
    _called("--sleep-idle-seconds", "--idle-unload-secs", _1=""),
    _idle("--enable-sleep-mode", "every engine can sleep: POST /sleep and POST /wake_up are there for operators"),
    Row("--keepalive", "--idle-unload-secs, after which a model is unloaded; /v1/models/unload does it at once"),
    _idle("--no-warmup --warmup --perf --no-perf", "a start has no run for warming; candle-vllm bench measures"),
    # ---- sampling and prompts
    _called("--temp", "--temperature"),
    _called("-s", "--seed", _1=""),
    _called("-n --predict --n-predict --num-predict --max-gen-tokens", "--max-tokens", _1=""),
    Row("-p --prompt -bf -f --file", "the prompt stands by itself: candle-vllm generate PROMPT; - reads it from "
        "standard input; the port is --p"),
    _called("-sys --system-prompt --system_prompt", "--system"),
    Row("-sysf --system-prompt-file", "--system, with the text itself"),
    _called("-r --reverse-prompt", "--stop"),
    Row("-cnv --conversation -no-cnv --no-conversation -st --single-turn -i --interactive -if --interactive-first -mli "
        "--multiline-input --in-prefix --in-suffix", "candle-vllm chat talks, candle-vllm generate answers once"),
    Row("-e --escape --no-escape -sp --special --verbose-prompt --no-display-prompt --display-prompt --simple-io "
        "--color -co --nowordwrap --hidethinking",
        "the answer alone goes to standard output, and thoughts, dimmed, to a terminal"),
    _only("--repeat-penalty", "--repetition-penalty, over the whole text and not its last tokens", "1", "1.0"),
    Row("--repeat-last-n --typical --typical-p --top-nsigma --top-n-sigma "
        "--xtc-probability --xtc-threshold --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n "
        "--dry-sequence-breaker --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr --mirostat-ent --samplers "
        "--sampler-seq --sampling-seq --adaptive-target --adaptive-decay --ignore-eos -l --logit-bias -bs "
        "--backend-sampling",
        f"{_REQUEST}, by llama.cpp's names (docs/sampling.md); samplers have one order"),
    Row("--grammar --grammar-file -j --json-schema -jf --json-schema-file --format "
        "--structured-outputs-config", f"{_REQUEST}: response_format, or structured_outputs"),
    _only("--guided-decoding-backend", "grammars are llguidance's", "auto", "guidance"),
    _only("--max-logprobs", "a request may ask for up to 20 alternatives (logprobs)", "20"),
    _only("--logprobs-mode", "log-probabilities are those before any sampling parameter", "raw_logprobs"),
    # ---- chat, tools, thoughts
    _so("--jinja", f"{_ALWAYS}: the model's template is rendered"),
    Row("--no-jinja --skip-chat-parsing --no-skip-chat-parsing", f"{_ALWAYS}: the model's template is rendered"),
    _called("--chat-template-file", "--chat-template"),
    _called("--chat-template-kwargs", "--default-chat-template-kwargs"),
    _only("--chat-template-content-format",
          "a template is given each content as one text, its parts on lines of their own", "auto", "string"),
    _only("--response-role", "answers are the assistant's", "assistant"),
    _so("--enable-auto-tool-choice --exclude-tools-when-tool-choice-none",
        "tools are looked for wherever a request has some, in the model's own format; --tool-call-parser names "
        "another; with tool_choice none they are not shown"),
    Row("--tool-parser-plugin --reasoning-parser-plugin --tools",
        "formats are built in (docs/tool-calling.md), and tools come with requests or from --mcp-config"),
    _so("--enable-reasoning", "thoughts are told from the answer by the model's own format"),
    Row("--reasoning-format", "thoughts are told from the answer by the model's own format; --reasoning-parser none "
        "leaves them in it", {"auto": "", "deepseek": "", "none": "--reasoning-parser none"}),
    _only("--reasoning -rea", f"{_REQUEST}: reasoning_effort, thinking_token_budget", "auto", "-1"),
    Row("--think --reasoning-config",
        f"{_REQUEST}: reasoning_effort, thinking_token_budget"),
    Row("--prefill-assistant --no-prefill-assistant", f"{_REQUEST}: continue_final_message"),
    # ---- HTTP and logging
    Row("--uds", "--host unix:///path", {ANY: _socket}),
    _called("--api-prefix", "--root-path"),
    Row("--path --public-path", "the pages are the web UI's own"),
    _called("--ssl-key-file", "--ssl-keyfile"),
    _called("--ssl-cert-file", "--ssl-certfile"),
    Row("--allowed-origins", "--cors-origin, once for each", {ANY: _origins}),
    _only("--allowed-methods --allowed-headers", "pages of --cors-origin may use every header, and every method that "
          "a route has", '["*"]'),
    Row("--cors", "--cors-origin"),
    Row("--allow-credentials", "keys travel in a header, and there are no cookies"),
    _idle("--timeout -to --timeout-keep-alive", "clients that stall are cut off within fixed times, and "
          "--request-timeout ends requests", values=True),
    _idle("--threads-http", "one loop serves everybody", values=True),
    _only("--api-server-count -asc --workers", "one loop serves everybody", "1"),
    Row("--h11-max-incomplete-event-size --h11-max-header-count",
        "the head of a request may have 64 KiB, which no client of an API comes near; it is a limit against abuse"),
    Row("--middleware", "a command line names no code to run; create_app of candle_vllm.server gives a program of "
        "yours the application, to put middleware around"),
    Row("--webui --ui", "--ui-server", {"": "--ui-server"}),
    Row("--no-webui --no-ui", "--no-ui-server", {"": "--no-ui-server"}),
    Row("--webui-config --webui-config-file", "people set up the web UI on its own page"),
    _so("--metrics --slots --enable-metrics --enable-server-load-tracking --enable-request-id-headers "
        "--enable-prompt-tokens-details --enable-tokenizer-info-endpoint",
        "/metrics, /load, /slots, /tokenizer_info, request ids and the details of usage are always there"),
    Row("--no-slots --props", "/slots and /props are there to be read, with a key where the server has one"),
    Row("--enable-per-request-metrics --kv-cache-metrics --kv-cache-metrics-sample", "/metrics has what is counted"),
    Row("--disable-fastapi-docs", "/docs needs a key where the server has one, and loads nothing from elsewhere"),
    Row("--return-tokens-as-token-ids", f"{_REQUEST}: return_token_ids"),
    Row("--fingerprint-mode", "system_fingerprint tells versions and settings of the model apart"),
    Row("--enable-log-requests", "--log-requests", {"": "--log-requests"}),
    Row("--disable-log-requests --no-enable-log-requests", "--no-log-requests, which it is unless asked for",
        {"": "--no-log-requests"}),
    Row("--enable-log-outputs --max-log-len --log-config-file",
        "--log-requests and --log-prompts"),
    _so("--disable-log-stats --disable-uvicorn-access-log", _NO_ACCESS_LOG),
    Row("--disable-access-log-for-endpoints", _NO_ACCESS_LOG, {ANY: ""}),
    _called("--otlp-traces-endpoint", "--otlp-endpoint"),
    Row("--uvicorn-log-level", _LEVEL, {ANY: "--log-level {}", "critical": "--log-level error",
                                        "trace": "--log-level debug"}),
    _idle("--verbose --record-conversation", "--log-level debug and --log-requests say what is logged"),
    Row("-v --log-verbose --debug", "--log-level debug", {"": "--log-level debug"}),
    Row("-lv --verbosity --log-verbosity --log-disable", _LEVEL),
    Row("--log-colors", _LOGGED, dict.fromkeys(("", "on", "off", "auto"), ""), idle=True),
    _idle("--log-prefix --no-log-prefix --log-timestamps --no-log-timestamps", _LOGGED),
    Row("--log-jsonl", "--log-format json", {"": "--log-format json"}),
    Row("--no-log-jsonl", "--log-format text", {"": "--log-format text"}),
    Row("--insecure", "downloads are checked always"),
    Row("-cl --cache-list --completion-bash --usage", "there is no such list; candle-vllm --help shows every flag"),
)  # fmt: skip

COMMANDS: Mapping[str, str] = {
    "complete": "to continue a prompt: candle-vllm generate PROMPT --m MODEL",
    "ls": "what was fetched: candle-vllm list; what a server has: GET /v1/models",
    "stop": "a model is unloaded by POST /v1/models/unload, or after --idle-unload-secs",
    "create": "several models and their settings: models.yaml (--models-config); a GGUF file: candle-vllm quantize",
    "launch": "to serve: candle-vllm --m MODEL",
    "collect-env": "to see every setting: candle-vllm config",
    "benchmark": "to measure: candle-vllm bench --m MODEL",
}


@cache
def foreign_flags() -> Mapping[str, Row]:
    """The row of each flag: its answer begins with a flag of ours where that does the same."""
    return dict(told())


def told() -> Iterator[tuple[str, Row]]:
    """Every flag of the table with its row."""
    for row in ROWS:
        for flag in row.flags.split():
            yield flag, row
