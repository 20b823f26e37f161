# SPDX-License-Identifier: MIT
"""The table of commands: what each one runs, and which settings, options and arguments it takes.

Read before step 1 of a request's life. `cli.py` runs a command from its row, `command_line.py` parses its arguments and
writes its help. A row names its function, because importing a command's module imports the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.sampling.params import BOUNDS
from candle_vllm.core.setting_kinds import Boolean, Choice, FilePath, FreeText, Integer, Kind, Number, Secret, Text
from candle_vllm.server.settings.options import (
    ADAPTERS,
    BATCHES,
    CALLS,
    DEVICE,
    GROUPS,
    LIMITS,
    LOGGING,
    MODEL,
    MODELS,
    REUSES,
    SAMPLING,
    SERVES,
    TOOLS,
    Option,
    switch,
)
from candle_vllm.server.settings.table import BY_NAME, OPTIONS


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: line about it in the help.
        runs: module below `candle_vllm.server`, and its function, which gets the settings (see `whole`), and as
            keyword arguments the given options and arguments of the command.
        uses: groups of settings that it uses, and the values of `Option.needs` that it fulfils.
        plus: further settings that it uses, by name.
        options: own options; they have no environment variable and no key in models.yaml.
        text: placeholder of its text, which is an argument; in brackets if the text may be left out, "" for no text.
        names_model: whether the model is an argument.
        several: whether a repeatable flag may be followed by several values, as in vLLM; not for a command with a text.
        whole: whether the function gets the whole configuration, not the settings of the default model.
        elsewhere: whether another server may have the model, so that a missing one is no error.
        hint: what to do instead of giving an argument that it does not take.
        epilog: end of its help.
    """

    summary: str
    runs: str
    uses: tuple[str, ...] = ()
    plus: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    text: str = ""
    names_model: bool = False
    several: bool = False
    whole: bool = False
    elsewhere: bool = False
    hint: str = ""
    epilog: str = ""

    @property
    def needs_text(self) -> bool:
        """Whether the text may not be left out."""
        return self.text != "" and not self.text.startswith("[")

    @property
    def serves_models(self) -> bool:
        """Whether it reads all that a server reads: `serve`, and `config`, which shows it."""
        return MODELS in self.uses

    @property
    def settings(self) -> tuple[Option, ...]:
        """The settings that it uses."""
        left_out = ("model", "weight_path", "weight_file") if self.names_model else ()
        groups = {option.name for option in OPTIONS if option.group in self.uses and option.needs in ("", *self.uses)}
        names = {*groups, *self.plus}.difference(left_out)
        return tuple(option for option in OPTIONS if option.name in names)


def _own(name: str, kind: Kind, text: str, metavar: str, **more: Any) -> Option:
    """Return an option of one command; its flag is derived from its name."""
    return Option(name, "command", ("--" + name.replace("_", "-"), *more.pop("also", ())), kind, text, metavar, **more)


def _switch(name: str, text: str, flag: str = "") -> Option:
    return Option(name, "command", (), Boolean(), text, constants={flag or "--" + name.replace("_", "-"): True})


_TOKENS = BOUNDS["max_tokens"]
_SYSTEM = _own("system", FreeText(least=0), "system message of the conversation", "TEXT")
MAX_TOKENS = _own("max_tokens", _TOKENS, "most tokens of an answer", "N")
_AS_JSON = _switch("as_json", "print one JSON object, not a table", "--json")
_CONFIG = _own("config", FilePath(), "YAML file of flags; flags on the command line precede it", "FILE")
_SHARE = Number(0, 1, open_high=True)
_BACKENDS = Choice(("openai", "openai-chat", "openai-embeddings", "vllm"))
_LENGTHS = (
    _own("input_len", _TOKENS, "length of each prompt", "N", also=("--random-input-len",)),
    _own("output_len", _TOKENS, "length of each answer", "N", also=("--random-output-len",)),
)
_SEED = _own("seed", Integer(0, 1 << 32, units=False), "the same seed makes the same requests", "N")
_DATA = (
    _own("dataset_name", Text(64), "random, sonnet, sharegpt, mt_bench, spec_bench, speed_bench or custom", "NAME"),
    _own("dataset_path", FilePath(), "file of the data set; random and sonnet have none", "FILE"),
    _own("num_prompts", Integer(1, 10_000_000), "how many requests (1000)", "N"),
    *_LENGTHS,
    _own("random_prefix_len", Integer(0, 1 << 24), "tokens that all random prompts begin with", "N"),
    _own("random_range_ratio", _SHARE, "random lengths: 1 - X to 1 + X times --input-len and --output-len", "X"),
    _SEED,
)
_MEASURED = (
    _own("base_url", Text(), "the server, without /v1 (http://127.0.0.1:2000)", "URL"),
    _own("host", Text(512), "host of the server, in place of --base-url", "HOST"),
    _own("port", Integer(1, 65535, units=False), "port of the server, in place of --base-url", "PORT"),
    _own("endpoint", Text(512), "path of the route; default: the one of the backend", "PATH"),
    _own("backend", _BACKENDS, "openai (text completions; vllm too), openai-chat or openai-embeddings", "NAME",
         also=("--endpoint-type",)),
    _own("model", Text(512), "the model's name on the server; default: the first one", "NAME", also=("--m",)),
    _own("served_model_name", Text(512), "the model's name on the server; preferred to --model", "NAME"),
    _own("tokenizer", FilePath(), "folder or .gguf file that counts tokens; else the server's /tokenize", "PATH"),
    _own("api_key", Secret(), "key for the server", "KEY"),
    _own("header", Text(4096), "further headers", "NAME=VALUE", repeat=True),
    _switch("insecure", "do not check certificates"),
)  # fmt: skip
_ARRIVING = (
    _own("request_rate", Text(64), "requests per second; inf, the default, sends all at once", "X"),
    _own("burstiness", Number(0, 1000, open_low=True), "1 is a Poisson process; less is burstier", "X"),
    _own("ramp_up_strategy", Choice(("linear", "exponential")), "how the rate grows over the requests", "NAME"),
    _own("ramp_up_start_rps", Integer(1, 1_000_000), "requests a second at the start of the ramp", "N"),
    _own("ramp_up_end_rps", Integer(1, 1_000_000), "requests a second at the end of the ramp", "N"),
    _own("max_concurrency", Integer(1, 100_000), "most requests at a time", "N"),
    _own("num_warmups", Integer(0, 1000), "warm-up requests, which are not counted", "N"),
    _switch("ignore_eos", "answers go on to their length; always for random prompts"),
    _own("temperature", BOUNDS["temperature"], "of every request", "X"),
    _own("top_p", BOUNDS["top_p"], "of every request", "X"),
    _own("top_k", BOUNDS["top_k"], "of every request", "K"),
    _own("extra_body", FreeText(), "further fields of every request", "JSON"),
)
_FIGURES = (
    _own("percentile_metrics", Text(64), "metrics with percentiles, of ttft,tpot,itl,e2el", "NAMES"),
    _own("metric_percentiles", Text(128), "the percentiles, such as 50,90,99 (99)", "NUMBERS"),
    _own("goodput", Text(128), "most milliseconds of a good request: ttft:200 tpot:50", "NAME:MS", repeat=True),
    _switch("save_result", "save the figures as JSON"),
    _switch("save_detailed", "save every request as well"),
    _switch("append_result", "append the figures to the file as one line"),
    _own("result_dir", FilePath(), "folder of the saved file", "FOLDER"),
    _own("result_filename", Text(255), "name of the saved file", "NAME"),
    _own("metadata", Text(4096), "further fields of that file", "NAME=VALUE", repeat=True),
)
_TEXT = (
    _own("file", FilePath(), "the text, a file in UTF-8", "FILE", also=("-f",)),
    _own("window", _TOKENS, "tokens that are read together", "N", also=("-c",)),
    _own("tokens", _TOKENS, "most tokens of the text", "N"),
)
_WRITTEN = (
    _own("out", FilePath(), "the file to write, which ends in .gguf", "FILE", also=("-o",)),
    _switch("force", "replace a file of that name"),
    dataclasses.replace(BY_NAME["threads"], group="command"),
)
_OUTPUT_JSON = _own("output_json", FilePath(), "save the figures", "FILE")
_N = _own("n", Integer(1, 64), "answers of each request", "N")

_CHAT_EPILOG = """\
On a pipe every line is a message or a command, and what stands between \"\"\" and \"\"\" is one message of several
lines. Answers go to standard output, remarks and errors to standard error; the status is 1 where a message failed.
"""
_PS_EPILOG = """\
--host, --port and --ssl-certfile are the running server's, --api-key is one of its API keys, not a management key.
"""
_BENCH = (MODEL, DEVICE, LIMITS, LOGGING)
_ANSWERING = (*_BENCH, SAMPLING)
_ALL = (*GROUPS, REUSES, CALLS, BATCHES, SERVES)
_FETCHING = ("revision", "hf_token", "hf_token_path", "download_dir", "offline", "log_level")

# fmt: off
COMMANDS: Mapping[str, Command] = {
    "serve": Command("serve the model over HTTP (what happens without a command)", "serve:serve", _ALL,
        options=(_CONFIG,), several=True, whole=True),
    "generate": Command("continue one prompt on the terminal", "commands.terminal:generate", _ANSWERING, text="PROMPT",
        options=(
            switch("chat", "command", "put the prompt into the model's chat template as a user message"),
            _SYSTEM,
            MAX_TOKENS,
            _own("stop", FreeText(1024), "text that ends the answer; repeatable", "TEXT", repeat=True),
        )),
    "chat": Command("talk with the model on the terminal", "commands.chat:chat", (*_ANSWERING, REUSES, ADAPTERS),
        options=(_SYSTEM, MAX_TOKENS), hint="one question is asked with candle-vllm generate --chat",
        epilog=_CHAT_EPILOG, whole=True),
    "agent": Command("carry out one request with the tools of MCP servers", "commands.agent:agent",
        (*_ANSWERING, REUSES, CALLS, TOOLS), text="REQUEST", elsewhere=True, options=(
            _own("base_url", Text(), "let a server with OpenAI's chat API answer, such as http://127.0.0.1:2000/v1; "
                 "--m is then the model's name there", "URL"),
            _own("api_key", Secret(), "key for that server", "KEY"),
            _switch("yes", "run every tool without asking"),
            _own("approve", Text(256), "tool that runs without asking, or server__*; repeatable", "NAME", repeat=True),
            _own("max_turns", Integer(1, 1000), "most turns of the model", "N"),
            _SYSTEM,
            MAX_TOKENS,
            _switch("as_json", "print every event as a line of JSON", "--json"),
        )),
    "bench": Command("measure the model on this machine", "commands.bench:bench", _BENCH, options=(
        _own("prompt_tokens", _TOKENS, "length of each prompt", "N"),
        _own("output_tokens", _TOKENS, "length of each answer", "N"),
        _own("concurrency", Integer(1, 4096), "requests at the same time", "N"),
        _own("repeat", Integer(1, 1000), "measured rounds; the median is reported", "N"),
        _AS_JSON,
    )),
    "bench serve": Command("measure a server with OpenAI's API, as vllm bench serve does", "bench.serve:bench_serve",
        plus=("log_level",), options=(*_MEASURED, *_DATA, *_ARRIVING, *_FIGURES),
        several=True, elsewhere=True),
    "bench throughput": Command("measure how fast the engine answers a data set", "bench.offline:bench_throughput",
        (*_BENCH, REUSES, BATCHES), options=(*_DATA, _N, _OUTPUT_JSON)),
    "bench latency": Command("measure how long the engine takes for a batch", "bench.offline:bench_latency", _BENCH,
        options=(
            *_LENGTHS,
            _own("batch_size", Integer(1, 4096), "requests at a time (8)", "N"),
            _N,
            _own("num_iters_warmup", Integer(0, 1000), "rounds before the measured ones (10)", "N"),
            _own("num_iters", Integer(1, 10_000), "measured rounds (30)", "N"),
            _SEED,
            _OUTPUT_JSON,
        )),
    "bench speculation": Command("measure the speedup by draft tokens on your own prompts",
        "bench.offline:bench_speculation", (*_BENCH, REUSES), options=(
            *_DATA[:3],
            _LENGTHS[1],
            _SEED,
            _own("pairs", Integer(1, 1000), "answers of each prompt with drafts and without (5)", "N"),
            _switch("skip_chat_template", "prompts are continued as they are"),
            _OUTPUT_JSON,
        )),
    "run-batch": Command("answer the requests of a file into another file", "commands.run_batch:run_batch",
        (*_ANSWERING, REUSES, CALLS, BATCHES, SERVES, ADAPTERS), whole=True, options=(
            Option("input_file", "command", ("-i", "--input-file"), FreeText(4096),
                   "the requests, a line of JSON each: a file, or an http:// or https:// address", "FILE"),
            Option("output_file", "command", ("-o", "--output-file"), FreeText(4096), "where the answers go, in the "
                   "same order: a file, which is written anew, or an address, by PUT", "FILE"),
            _own("output_tmp_dir", FilePath(), "folder of the answers before they go to an address", "FOLDER"),
        )),
    "run": Command("chat with a model, which is downloaded first if necessary", "commands.library:run",
        (*_ANSWERING, REUSES), names_model=True, text="[PROMPT]", options=(_SYSTEM, MAX_TOKENS),
        epilog="The text of a pipe or a file on standard input precedes the prompt; < /dev/null leaves it unread.\n"),
    "pull": Command("download a model from Hugging Face, after showing its size and whether it fits",
        "commands.library:pull", plus=(*_FETCHING, "device"), names_model=True),
    "list": Command("show the models that were fetched", "commands.library:list_models",
        plus=("download_dir", "log_level"),
        options=(_switch("known", "the short names, and the memory that each needs"),)),
    "show": Command("show what is known of a model", "commands.library:show", plus=(*_FETCHING, "device"),
        names_model=True),
    "rm": Command("remove a model that was fetched", "commands.library:rm", plus=("download_dir", "log_level"),
        names_model=True),
    "ps": Command("show what a running server has in memory", "commands.library:ps",
        plus=("host", "port", "api_key", "ssl_certfile", "log_level"), epilog=_PS_EPILOG),
    "quantize": Command("write the model as a GGUF file, quantised or plain", "commands.quantize:quantize",
        (MODEL, LOGGING), plus=("chat_template",), hint="candle-vllm quantize --m MODEL --isq q4k --out FILE.gguf",
        options=(
            *_WRITTEN,
            _own("dtype", BY_NAME["dtype"].kind, "type of matrices without --isq: auto (as stored), f32, bf16, f16",
                 "TYPE"),
            _own("lora", Text(4096), "adapter to merge into it, times SCALE (1); repeatable", "PATH[:SCALE]",
                 repeat=True),
            _own("lora_to_gguf", FilePath(), "write this adapter for it as a GGUF file instead", "FOLDER"),
        )),
    "imatrix": Command("measure on a text how much the inputs of each matrix matter, for quantize and --isq",
        "commands.perplexity:imatrix", (MODEL, LOGGING), plus=("packed_cache", "load_format", "model_impl"),
        options=(*_TEXT, *_WRITTEN)),
    "perplexity": Command("measure how well the model predicts a text, and how far it is from a reference",
        "commands.perplexity:perplexity", (MODEL, DEVICE, LOGGING), options=(
            *_TEXT, _own("reference", Text(), "model to compare with, which runs first", "MODEL"), _AS_JSON)),
    "config": Command("show every setting, and where its value comes from", "commands.config:config", _ALL,
        options=(_CONFIG, _AS_JSON), several=True, whole=True),
}
# fmt: on
