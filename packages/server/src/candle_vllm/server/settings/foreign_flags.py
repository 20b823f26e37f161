"""Flags and commands of vLLM, llama.cpp, Ollama and candle-vllm that are called otherwise here, or are not needed.

A row is the flags and the answer: a flag that does the same, with what else there is to say, or a sentence that says
why there is none. What exists here under that very name is not in the table; a test sees to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

_ONE_DEVICE = "an engine computes on one device; for several GPUs start a server on each (--device cuda:N)"
_WHOLE = "a model lies whole on a GPU or on the CPU (--device); nothing is divided between them"
_DRAFTS = "no drafts are made, so there is nothing to set"
_LORA = "adapters are not loaded beside a model: merge the adapter into its weights first"
_IMAGES = "models read text alone here"
_OWN = "the kernels are this project's own and chosen for the machine"
_MAPPED = "weights are mapped while they are loaded, and then lie in memory in the kernels' order"
_PROXY = "HTTPS needs a reverse proxy in front"
_REQUEST = "it is a field of each request"
_NO_CODE = "code of a model's repository is never run: its architecture is built in, or refused"
_ALWAYS = "it is always so"

_ROWS: tuple[tuple[str, str], ...] = (
    # ---- the model and its files
    ("--hf-repo -hf -hfr --model-path --model-id --model-name", "--m"),
    ("-hff --hf-file", "--f"),
    ("-hft", "--hf-token, which takes the name of the variable"),
    ("-mu --model-url -dr --docker-repo", "--m, with a Hugging Face id or a file that you have downloaded"),
    ("-a --alias", "--served-model-name"),
    ("--models-dir --models-preset --models-max --models-autoload --no-models-autoload",
     "--models-config, with models.yaml; --max-loaded-models bounds how many stay"),
    ("-q --quantization", "nothing to say: the checkpoint says how it is quantised; --isq quantises plain weights"),
    ("--quantize", "--isq, or candle-vllm quantize, which writes a file"),
    ("--trust-remote-code", _NO_CODE),
    ("--tokenizer-mode --tokenizer-revision --hf-config-path --hf-overrides --config-format --override-kv "
     "--skip-tokenizer-init", "the model's files say it; --tokenizer names another folder"),
    ("--generation-config --override-generation-config",
     "the model's generation_config.json counts; --temperature, --top-p, --top-k and --min-p stand above it"),
    ("--config", "--models-config, or the environment (CANDLE_VLLM_PORT=2000), or .env"),
    ("--runner --task --convert --embedding --embeddings --rerank --reranking",
     "one server answers chat, embeddings and scores, as far as the model can"),
    ("--pooling --override-pooler-config --pooler-config --embd-normalize",
     "the model's files say how vectors are made"),
    ("--lora --lora-scaled --lora-init-without-apply --enable-lora --lora-modules --max-loras --max-lora-rank "
     "--max-cpu-loras --fully-sharded-loras", _LORA),
    ("--control-vector --control-vector-scaled --control-vector-layer-range", "there are no control vectors"),
    ("--mmproj --mmproj-url --mmproj-auto --no-mmproj --mmproj-offload --no-mmproj-offload --image --video --audio "
     "--image-min-tokens --image-max-tokens --limit-mm-per-prompt --mm-processor-kwargs --mm-encoder-tp-mode "
     "--allowed-local-media-path --allowed-media-domains --enable-vision --vision-model-path --vision-device "
     "--vision-dtype", _IMAGES),
    # ---- devices and memory
    ("-ngl --gpu-layers --n-gpu-layers --num-gpu -ncmoe --n-cpu-moe -cmoe --cpu-moe -ot --override-tensor -ncffn "
     "--n-cpu-ffn --moe-cache-mib --cpu-offload-gb -kvo --kv-offload -nkvo --no-kv-offload --op-offload "
     "--no-op-offload --kv-offloading-size --kv-offloading-backend --swap-space --kvcache-mem-cpu --no-host "
     "--num-experts-offload-per-rank -fit --fit -fitt --fit-target -fitc --fit-ctx", _WHOLE),
    ("-dev --main-gpu -mg", "--device cuda:N"),
    ("--list-devices", "candle-vllm config shows the device that is taken"),
    ("-sm --split-mode -ts --tensor-split -tp --tensor-parallel-size -pp --pipeline-parallel-size -dp "
     "--data-parallel-size --enable-expert-parallel --distributed-executor-backend --num-nodes --node-rank "
     "--master-addr --master-port --multithread --rpc --num-shards", _ONE_DEVICE),
    ("--gpu-memory-fraction", "--gpu-memory-utilization"),
    ("--max-seq-len --max-model-length -c --ctx-size --num-ctx --max-seq-len-to-capture",
     "--max-model-len"),
    ("-ctk --cache-type-k -ctv --cache-type-v", "--kv-cache-dtype, for both"),
    ("--calculate-kv-scales", "a checkpoint's own scales are used with --kv-cache-dtype fp8"),
    ("--kvcache-compression-bits --kvcache-compression-policy --kvcache-compression-threshold-tokens "
     "--kvcache-compression-free-block-pct",
     "the cache is not compressed; --kv-cache-dtype fp8 halves it on a GPU"),
    ("--mamba-fraction", "no model here has a Mamba state"),
    ("-fa --flash-attn --use-flash-attn", "--attention-backend, on a GPU; the CPU's is always the fused one"),
    ("--mlock --no-mmap --mmap --direct-io -dio --no-direct-io -lm --load-mode -lzm --lazy-mode --repack -nr "
     "--no-repack", _MAPPED),
    ("-tb --threads-batch", "--threads, for prompts and answers"),
    ("-t --num-thread --n-threads", "--threads"),
    ("-C --cpu-mask -Cr --cpu-range --cpu-strict -Cb --cpu-mask-batch -Crb --cpu-range-batch --cpu-strict-batch "
     "--numa", "start it under taskset or numactl: threads are as many as the CPUs that it may use"),
    ("--prio --prio-batch", "start it under nice"),
    ("--poll --poll-batch", "threads spin for a fraction of a millisecond and then sleep"),
    ("--check-tensors", "every number of a file's head is checked before it is used"),
    ("--swa-full --defrag-thold -dt --keep --context-shift --no-context-shift -ctxcp --ctx-checkpoints "
     "--swa-checkpoints --cache-ram -cram --kv-unified -kvu --no-kv-unified",
     "the cache is in blocks, which no model shifts or defragments; a context that is full ends the answer"),
    ("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor "
     "--yarn-attn-factor --yarn-beta-slow --yarn-beta-fast --rope-theta",
     "--yarn-scaling-factor, for a longer context; else the model's files say it"),
    # ---- scheduling
    ("-np --parallel --num-parallel --max-concurrency", "--max-num-seqs"),
    ("-b --batch-size -ub --ubatch-size", "--prefill-chunk-size, which is what a step computes at most"),
    ("-cb --cont-batching -nocb --no-cont-batching --enable-chunked-prefill --no-enable-chunked-prefill "
     "--async-scheduling --holding-time --scheduling-policy",
     "requests join and leave at every step, and long prompts come in chunks; priorities: --enable-request-priority"),
    ("--max-num-queued-reqs --max-num-queued-tokens --max-queue", "--max-queued-requests"),
    ("--cache-prompt --no-cache-prompt --cache-reuse --prompt-cache --prompt-cache-backend --prompt-cache-path "
     "--prompt-cache-redis-url --prompt-cache-ttl --prompt-cache-max-prefixes --prompt-cache-min-length "
     "--prompt-cache-all --prompt-cache-ro --prefix-cache --prefix-cache-max-tokens --prefix-caching-hash-algo "
     "--slot-save-path --slot-prompt-similarity -sps",
     "what prompts begin with is kept in the KV cache itself; --disable-prefix-cache turns that off"),
    ("--speculative-config --spec-decode --num-speculative-tokens -md --model-draft --spec-draft-model -hfd "
     "--hf-repo-draft -ngld --gpu-layers-draft --draft --draft-n --draft-max --draft-min --draft-n-min --draft-p-min "
     "-cd --ctx-size-draft -devd --device-draft -ctkd --cache-type-k-draft -ctvd --cache-type-v-draft "
     "--spec-draft-type-k --spec-draft-type-v -td --threads-draft -lcs --lookup-cache-static -lcd "
     "--lookup-cache-dynamic --spec-type", _DRAFTS),
    ("-O -O0 -O1 -O2 -O3 --compilation-config --cudagraph-capture-sizes",
     f"{_OWN}; --disable-cuda-graph and --enforce-eager turn graphs off"),
    ("--stream-interval", "every token is sent when it is there"),
    ("--enable-sleep-mode --keepalive --sleep-idle-seconds", "--idle-unload-secs"),
    ("--no-warmup --warmup --perf --no-perf", "a start has no run for warming; candle-vllm bench measures"),
    # ---- sampling and prompts
    ("--temp", "--temperature"),
    ("-s", "--seed"),
    ("-n --predict --n-predict --num-predict --max-gen-tokens", "--max-tokens"),
    ("-p --prompt -bf -f --file", "the prompt stands by itself: candle-vllm generate PROMPT; - reads it from "
     "standard input; the port is --p"),
    ("-sys --system-prompt --system_prompt -sysf --system-prompt-file", "--system"),
    ("-r --reverse-prompt", "--stop"),
    ("-cnv --conversation -no-cnv --no-conversation -st --single-turn -i --interactive -if --interactive-first -mli "
     "--multiline-input --in-prefix --in-suffix", "candle-vllm chat talks, candle-vllm generate answers once"),
    ("-e --escape --no-escape -sp --special --verbose-prompt --no-display-prompt --display-prompt --simple-io "
     "--color -co --nowordwrap --hidethinking",
     "the answer alone goes to standard output, and thoughts, dimmed, to a terminal"),
    ("--repeat-penalty --repetition-penalty --repeat-last-n --typical --typical-p --top-nsigma --top-n-sigma "
     "--xtc-probability --xtc-threshold --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n "
     "--dry-sequence-breaker --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr --mirostat-ent --samplers "
     "--sampler-seq --sampling-seq --adaptive-target --adaptive-decay --ignore-eos -l --logit-bias -bs "
     "--backend-sampling",
     "requests have repetition_penalty, ignore_eos and logit_bias; the samplers are temperature, top-p, top-k, "
     "min-p and penalties"),
    ("--grammar --grammar-file -j --json-schema -jf --json-schema-file --format --guided-decoding-backend "
     "--structured-outputs-config", f"{_REQUEST}: response_format, or structured_outputs"),
    ("--max-logprobs --logprobs-mode", f"{_REQUEST}: logprobs"),
    # ---- chat, tools, thoughts
    ("--jinja --no-jinja --skip-chat-parsing --no-skip-chat-parsing", f"{_ALWAYS}: the model's template is rendered"),
    ("--chat-template-file", "--chat-template, which takes a file"),
    ("--chat-template-kwargs --default-chat-template-kwargs --chat-template-content-format",
     f"{_REQUEST}: chat_template_kwargs"),
    ("--enable-auto-tool-choice --exclude-tools-when-tool-choice-none --tool-parser-plugin --tools",
     "tools are looked for wherever a request has some, in the model's own format; --tool-parser names another"),
    ("--enable-reasoning --reasoning --reasoning-format -rea --think --reasoning-config",
     "thoughts are told from the answer by the model's own format; --reasoning-parser names another, and a request "
     "says how much (reasoning_effort, thinking_token_budget)"),
    ("--prefill-assistant --no-prefill-assistant", f"{_REQUEST}: continue_final_message"),
    # ---- HTTP and logging
    ("--uds", "--host unix:///path"),
    ("--api-prefix --root-path --path --public-path", "paths are fixed; a reverse proxy may add to them"),
    ("--ssl-key-file --ssl-cert-file --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers "
     "--enable-ssl-refresh", _PROXY),
    ("--allowed-origins --allowed-methods --allowed-headers --allow-credentials --cors", "--cors-origin"),
    ("--timeout -to --timeout-keep-alive", "--request-timeout"),
    ("--threads-http --api-server-count --workers --h11-max-incomplete-event-size --h11-max-header-count --middleware",
     "one loop serves everybody, within fixed limits"),
    ("--webui --ui --no-webui --no-ui --webui-config --webui-config-file", "--ui-server, without which there is none"),
    ("--metrics --props --slots --no-slots --enable-server-load-tracking --kv-cache-metrics --enable-metrics "
     "--enable-request-id-headers --enable-per-request-metrics --enable-prompt-tokens-details "
     "--enable-force-include-usage",
     "/metrics, /v1/models/status and request ids are always there, and usage is what the request asks for"),
    ("--disable-fastapi-docs --enable-tokenizer-info-endpoint --fingerprint-mode --return-tokens-as-token-ids",
     "there is nothing to switch"),
    ("--enable-log-requests --disable-log-requests --enable-log-outputs",
     "--log-requests, which is off unless asked for"),
    ("--max-log-len --log-config-file --record-conversation", "--log-requests and --log-prompts"),
    ("--disable-log-stats --disable-uvicorn-access-log --disable-access-log-for-endpoints", "nothing of it is logged"),
    ("--otlp-traces-endpoint", "--otlp-endpoint"),
    ("--uvicorn-log-level -v --verbose --log-verbose -lv --verbosity --log-verbosity --log-disable --debug",
     "--log-level"),
    ("--log-colors --log-prefix --no-log-prefix --log-timestamps --no-log-timestamps",
     "the log goes to standard error: 2> FILE keeps it; --log-format json is for programs"),
    ("--log-jsonl --no-log-jsonl", "--log-format json"),
    ("--insecure", "downloads are checked always"),
    ("-cl --cache-list --completion-bash --usage", "there is no such list; candle-vllm --help shows every flag"),
)  # fmt: skip

_IDLE = (
    "--verbose --record-conversation --multithread --prompt-cache",
    "--holding-time --mamba-fraction --kvcache-mem-cpu --prefix-cache-max-tokens --prompt-cache-backend "
    "--prompt-cache-path --prompt-cache-redis-url --prompt-cache-ttl --prompt-cache-max-prefixes "
    "--prompt-cache-min-length --kvcache-compression-bits --kvcache-compression-policy "
    "--kvcache-compression-threshold-tokens --kvcache-compression-free-block-pct",
)  # without and with a value
WITHOUT_EFFECT: Mapping[str, bool] = {
    flag: takes for takes, flags in zip((False, True), _IDLE, strict=True) for flag in flags.split()
}
"""candle-vllm's flags that would change no answer: they are taken with a warning. True is one that has a value."""

COMMANDS: Mapping[str, str] = {
    "run": "to talk with a model: candle-vllm chat --m MODEL",
    "complete": "to continue a prompt: candle-vllm generate PROMPT --m MODEL",
    "pull": "a model is downloaded when it is first used: candle-vllm --m MODEL",
    "list": "the server says which models it has: GET /v1/models",
    "ls": "the server says which models it has: GET /v1/models",
    "ps": "the server says what is loaded: GET /v1/models/status",
    "show": "what a model is served with: candle-vllm config --m MODEL",
    "stop": "a model is unloaded by POST /v1/models/unload, or after --idle-unload-secs",
    "create": "several models and their settings: models.yaml (--models-config); a GGUF file: candle-vllm quantize",
    "rm": "downloads are Hugging Face's: hf cache",
    "launch": "to serve: candle-vllm --m MODEL",
    "collect-env": "to see every setting: candle-vllm config",
    "benchmark": "to measure: candle-vllm bench --m MODEL",
}


@cache
def foreign_flags() -> Mapping[str, str]:
    """The answer to each flag: it begins with a flag of ours where that does the same."""
    return dict(_told())


def _told() -> Iterator[tuple[str, str]]:
    for flags, answer in _ROWS:
        for flag in flags.split():
            yield flag, answer


def hint(flag: str, known: Mapping[str, list[str]], command: str) -> str:
    """What is said of a flag that stands in the table.

    Args:
        flag: as it was given.
        known: the commands that each of our flags belongs to.
        command: which was called.
    """
    answer = foreign_flags()[flag]
    if not answer.startswith("--"):
        return f"{flag} is not needed here: {answer}"
    name, comma, more = answer.partition(",")
    commands = known[name.split()[0]]
    where = "" if command in commands else f" (of `candle-vllm {', '.join(commands)}`)"
    if name == "--max-tokens" and where:
        where += "; clients of a server send max_tokens"
    return f"{flag} is called {name} here{where}{comma}{more}"
