# SPDX-License-Identifier: MIT
"""Code that comes in files or messages: none is imported, unpickled or evaluated, wherever it hides."""

from __future__ import annotations

import ast
import builtins
import json
import marshal
import os
import pickle
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.errors import CandleVllmError, UnsupportedModelError
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.remote.line import Start
from candle_vllm.core.remote.wire import FromChild, Greeting, MalformedMessageError, Reader, ToChild
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.openai.formats.table import TOOL_FORMATS
from candle_vllm.openai.formats.values import python_value
from tests.common_run import few
from tests.security.guarded_server import chat_body, guarded

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "packages").glob("*/src/**/*.py"))

# Modules that turn bytes into objects of any class, or text into code.
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm", "yaml.loader", "code",
    "codeop", "runpy", "imp", "jsonpickle", "multiprocessing.connection", "xmlrpc", "numexpr",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.jit.load", "torch.package", "torch.hub.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "np.load",
    "numpy.load", "np.fromregex", "os.system", "os.popen", "socket.send_pyobj", "socket.recv_pyobj", "pandas.eval",
    "AutoModel.from_pretrained", "AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "ast.literal_eval",
    "asyncio.create_subprocess_shell", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
FORBIDDEN_ATTRIBUTES = {"send_pyobj", "recv_pyobj", "load_module", "exec_module", "allow_pickle", "from_pretrained"}
FORBIDDEN_KEYWORDS = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute, else nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that is not ours, or make objects of classes that a file names."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name in FORBIDDEN_MODULES or name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
                yield f"imports {name}"
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield f"uses {node.id}"
        if isinstance(node, ast.Attribute):
            path = dotted(node)
            if path in FORBIDDEN_CALLS or node.attr in FORBIDDEN_ATTRIBUTES:
                yield f"uses {path or node.attr}"
            if node.attr in FORBIDDEN_NAMES and path.split(".")[0] == "builtins":
                yield f"uses {path}"
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if value is FORBIDDEN_KEYWORDS[node.arg]:
                yield f"passes {node.arg}={value}"
        if (
            isinstance(node, ast.Call)
            and dotted(node.func) in ("importlib.import_module", "import_module")
            and not isinstance(node.args[0], ast.Constant)
        ):
            yield "imports a module by a name that is made at run time"


# What is found and does no harm, each in one place.
EXCUSED = {
    ("kernels/attention/flash_attn.py", "imports a module by a name that is made at run time"),  # two that stand there
    ("kernels/cpu_runtime/operation.py", "imports a module by a name that is made at run time"),  # kernels name them
    ("core/__init__.py", "imports a module by a name that is made at run time"),  # our own, from a table there
    ("core/loading/quantised.py", "imports a module by a name that is made at run time"),  # our own, of one package
    ("core/models/registry.py", "imports a module by a name that is made at run time"),  # a table there
    ("server/cli.py", "imports a module by a name that is made at run time"),  # our own, from a table there
    ("server/__init__.py", "imports a module by a name that is made at run time"),  # our own, from a table there
    ("responses/__init__.py", "imports a module by a name that is made at run time"),  # our own, from a table there
    ("responses/store/backend.py", "imports a module by a name that is made at run time"),  # our own `sql`
    ("openai/formats/values.py", "uses ast.literal_eval"),  # literals alone, of bounded length and depth
}


def test_deserialisation_and_eval_are_nowhere() -> None:
    """CVE-2025-62164, -24357, -29783, -32444, -47277, -30165, -32434, -9141, CVE-2026-3059, -3060, -24747: by the
    syntax tree of every module, there is nothing that unpickles, evaluates or loads code."""
    assert len(SOURCES) > 200
    wrong: list[str] = []
    excused: set[tuple[str, str]] = set()
    for path in SOURCES:
        for finding in findings(ast.parse(path.read_text("utf-8"))):
            known = {pair for pair in EXCUSED if path.as_posix().endswith(pair[0]) and finding == pair[1]}
            excused |= known
            if not known:
                wrong.append(f"{path.relative_to(ROOT)}: {finding}")
    assert excused == EXCUSED, "an excuse that nobody needs any more"
    assert wrong == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "eval('1')", "exec('1')", "f = eval", "compile('1', '', 'eval')", "__import__('os')",
        "import builtins\nbuiltins.exec",
        "import yaml\nyaml.load(x)", "s.recv_pyobj()", "import marshal", "m.f(trust_remote_code=True)",
        "import subprocess\nsubprocess.run('x', shell=True)", "import importlib\nimportlib.import_module(x)",
        "np.load('x', allow_pickle=True)", "torch.load('x', weights_only=False)", "import ast\nast.literal_eval(x)",
    ],
)  # fmt: skip
def test_the_walk_finds_what_it_looks_for(code: str) -> None:
    """The test above would fail for each of these."""
    assert list(findings(ast.parse(code)))


# ---- trust_remote_code -----------------------------------------------------------------------------------------------


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file that code from a model would write; and nothing may become a module from below the test's folder."""
    mark = tmp_path / "code-has-run"
    monkeypatch.setenv("SECURITY_TEST_MARK", str(mark))
    monkeypatch.chdir(tmp_path)
    yield mark
    assert not mark.exists(), "code that came with a model was run"
    below = [
        name for name, module in list(sys.modules.items()) if str(tmp_path) in str(getattr(module, "__file__", ""))
    ]
    assert below == []


CODE = "import os, pathlib\npathlib.Path(os.environ['SECURITY_TEST_MARK']).write_text('x')\n"
AUTO_MAP = {
    "AutoConfig": "modeling_evil.EvilConfig",
    "AutoModel": "modeling_evil.EvilModel",
    "AutoModelForCausalLM": "evil/repo--modeling_evil.EvilModel",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
    "AutoProcessor": "processing_evil.EvilProcessor",
}


def plant(folder: Path) -> None:
    """Modules in every place from which code has been loaded before."""
    names = [
        "modeling_evil",
        "tokenization_evil",
        "processing_evil",
        "configuration_evil",
        "__init__",
        "setup",
        "sitecustomize",
    ]
    for name in names:
        (folder / f"{name}.py").write_text(CODE)
    for part in ("1_Pooling", "custom_generate"):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "generate.py").write_text(CODE)
        (folder / part / "__init__.py").write_text(CODE)


def test_trust_remote_code_by_auto_map(tmp_path: Path, never_run: Path) -> None:
    """CVE-2025-66448, CVE-2026-22807, CVE-2026-27893: `auto_map` names code of the repository, also in sub-configs.
    A family that we implement is served by our own code, and theirs is never imported."""
    nested = {"auto_map": AUTO_MAP, "model_type": "evil", "architectures": ["EvilModel"]}
    config = toy_config(
        auto_map=AUTO_MAP, custom_pipelines={"evil": {"impl": "modeling_evil.E"}}, trust_remote_code=True
    )
    config |= {"vision_config": nested, "text_config": None, "audio_config": {"sub_config": nested}}
    folder = write_toy_model(tmp_path / "model", {key: value for key, value in config.items() if value is not None})
    plant(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": AUTO_MAP, "tokenizer_class": "EvilTokenizer", "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": ".", "trust_remote_code": True}))
    before = set(sys.modules)
    try:
        with InferenceEngine(str(folder), device="cpu", kv_cache_memory=1 << 20, threads=1) as engine:
            assert engine.model_info.architecture == "llama"
    except CandleVllmError:
        pass  # a sub-config that is not understood may be refused; it may not be run
    assert not any("evil" in name or "transformers_modules" in name for name in set(sys.modules) - before)


@pytest.mark.parametrize("architecture", ["EvilModel", "modeling_evil.EvilModel", "../modeling_evil", "os.system", ""])
@pytest.mark.parametrize("model_type", ["evil", "modeling_evil", "../evil", "__init__", "llama.py", "os"])
def test_trust_remote_code_by_model_type(tmp_path: Path, never_run: Path, architecture: str, model_type: str) -> None:
    """CVE-2026-27893: a family is chosen by a table of ours, and never by a name that is imported."""
    config = toy_config(auto_map=AUTO_MAP) | {"model_type": model_type, "architectures": [architecture]}
    folder = write_toy_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    plant(folder)
    with pytest.raises(UnsupportedModelError, match=r"model_type|architecture|implemented|supported"):
        InferenceEngine(str(folder), device="cpu")


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Evil:
    """Writes the mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (CODE,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "x.ckpt", "x.pkl"]
)
def test_deserialisation_of_weights(tmp_path: Path, never_run: Path, name: str) -> None:
    """CVE-2025-24357, CVE-2025-32434, CVE-2026-24747: weights in pickles are refused, however they are named."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(toy_config()))
    torch.save({"x": Evil()}, folder / name)
    for given in (folder, folder / name):
        with pytest.raises(UnsupportedModelError, match="pickles"):
            model_files(EngineConfig(model=str(given)))
        with pytest.raises(UnsupportedModelError, match="pickles"):
            InferenceEngine(str(given), device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_deserialisation_under_another_name(tmp_path: Path, never_run: Path, name: str) -> None:
    """CVE-2025-24357 behind a harmless ending: the bytes are what counts."""
    folder = write_toy_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if name.endswith("gguf"):
        (folder / "config.json").unlink()
    for data in (pickle.dumps(Evil()), marshal.dumps(compile(CODE, "x", "exec"))):
        (folder / name).write_bytes(data)
        with pytest.raises(CandleVllmError) as refused:
            InferenceEngine(str(folder), device="cpu")
        assert "\n" not in str(refused.value)


def test_deserialisation_of_prompt_embeds(tmp_path: Path, never_run: Path) -> None:
    """CVE-2025-62164: `prompt_embeds` was a pickled tensor of the client's. It is refused by name, and not decoded."""
    embeds = "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0b3VjaJSFlFKULg=="  # a pickle in base64
    with guarded() as server, server.http() as client:
        for path, body in (
            ("/v1/completions", {"model": "default", "prompt": "a", "prompt_embeds": embeds}),
            ("/v1/completions", {"model": "default", "prompt_embeds": [embeds]}),
            ("/v1/chat/completions", chat_body(prompt_embeds=embeds)),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in ("prompt_embeds", "prompt")


# ---- between processes -----------------------------------------------------------------------------------------------


def hostile_messages() -> list[bytes]:
    """What has been sent to the sockets of others, and what would confuse a reader of MessagePack."""
    deep = b"\x91" * 100_000
    return [
        b"", b"\x00", b"\xc1", pickle.dumps(Evil()), marshal.dumps(compile(CODE, "x", "exec")), deep,
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc7\xff\x00", b"\xd4\x00\x00",
        msgspec.msgpack.encode(["__import__", "os"]), msgspec.msgpack.encode({"__class__": "os.system"}),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(0, pickle.dumps(Evil()))), msgspec.json.encode(["abort", "1"]),
    ]  # fmt: skip


def test_deserialisation_between_processes(never_run: Path) -> None:
    """CVE-2025-29783, -32444, -47277, -30165, CVE-2026-3059, -3060: what crosses the line to the engine's process is
    MessagePack of known structs; a pickle is no message, in either direction."""
    for kinds in (ToChild, FromChild, Greeting):
        reader = Reader(kinds)
        for data in hostile_messages():
            with pytest.raises(MalformedMessageError):
                reader.read(data)
    for data in hostile_messages():
        with pytest.raises((msgspec.MsgspecError, RecursionError)):
            msgspec.msgpack.decode(data, type=Start)


def test_a_stranger_on_the_engines_socket_is_not_heard(toy_model: Path, never_run: Path) -> None:
    """CVE-2026-3059, CVE-2026-3060 (ZMQ sockets that anybody could reach): ours is no network socket, lies in a folder
    of this user alone, and what comes without the token does nothing."""
    with RemoteEngine(str(toy_model), device="cpu", kv_cache_memory=1 << 20, threads=1) as engine:
        address = engine._process.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        assert address.startswith("ipc://")
        folder = Path(address.removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o077 == 0
        assert folder.stat().st_uid == os.getuid()
        with zmq.Context() as context:
            for identity in (None, b"c", b"s" + b"\0" * 32, b"c" + b"x" * 32):
                stranger = context.socket(zmq.DEALER)
                stranger.setsockopt(zmq.LINGER, 500)
                if identity is not None:
                    stranger.setsockopt(zmq.ROUTING_ID, identity)
                stranger.connect(address)
                for data in hostile_messages():
                    stranger.send(data)
                    stranger.send_multipart([data, data])
                stranger.close()
        (output,) = engine.generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert len(output.token_ids) == 4
        assert engine.is_alive


# ---- eval in parsers -------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    "__import__('os').system('touch evil')", "exec(open('x').read())", "().__class__.__bases__[0].__subclasses__()",
    "[x for x in (1).__class__.mro()]", "lambda: 0", "f'{1+1}'", "9**9**9", "'a'*10**10", "{1: print}",
    "open('/etc/passwd')",
]  # fmt: skip


@pytest.mark.parametrize("name", few([row.name for row in TOOL_FORMATS], "json", "hermes", "llama3_json", "pythonic"))
def test_eval_in_a_tool_parser(name: str, never_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CVE-2025-9141: qwen3_coder's parser evaluated what the model wrote. Every format reads expressions as text."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
    seen: list[str] = []
    for forbidden in ("eval", "exec"):
        really = getattr(builtins, forbidden)

        def noted(*arguments: Any, really: Any = really, **options: Any) -> Any:
            seen.append(str(arguments[0]))
            return really(*arguments, **options)

        monkeypatch.setattr(builtins, forbidden, noted)
    with guarded(ScriptedEngine(_calls), tool_parser=name) as server, server.http() as client:
        for number in range(len(EXPRESSIONS)):
            messages = [{"role": "user", "content": f"case {number}"}]
            answer = client.post(
                "/v1/chat/completions", json=chat_body(messages=messages, tools=[tool], max_tokens=2000)
            )
            assert answer.status_code == 200, answer.text
    assert not any(expression in text for text in seen for expression in EXPRESSIONS)
    assert not (tmp_path / "evil").exists()


CRASHING = {
    "signs": "-" * 200_000 + "1", "sum": "1" + "+1" * 100_000, "complex": "1" + "+1j" * 50_000,
    "brackets": "[" * 200_000, "pairs": "[" * 60 + "]" * 60, "braces": "{0:" * 100_000, "not": "not " * 50_000 + "1",
    "attributes": "a" + ".a" * 100_000, "calls": "a" + "()" * 99_999, "power": "2" + "**2" * 60_000,
    "lambda": "lambda:" * 30_000 + "0", "strings": "'a'" * 60_000, "digits": "9" * 300_000, "null": "\0" * 1000,
    "exponent": "1e" + "9" * 100_000, "escapes": "'" + "\\N{x}" * 40_000 + "'",
}  # fmt: skip


@pytest.mark.parametrize("text", CRASHING.values(), ids=CRASHING)
def test_eval_of_literals_cannot_crash(text: str) -> None:
    """CVE-2025-9141, its smaller brother: texts at which Python's own parser of literals has died or taken minutes."""
    began = time.thread_time()
    value = python_value(text)
    assert value is None or json.loads(value) is not None
    assert time.thread_time() - began < 2


def _calls(prompt: str) -> str:
    """Calls with one of the expressions as argument, in the notations of several models."""
    found = re.search(r"case (\d+)", prompt)
    assert found is not None
    expression = EXPRESSIONS[int(found[1])]
    return (
        f"<tool_call>\n<function=f>\n<parameter=a>\n{expression}\n</parameter>\n</function>\n</tool_call>"
        f'<tool_call>{{"name": "f", "arguments": {{"a": {expression}}}}}</tool_call>'
        f'[f(a={expression})]<|python_tag|>f.call(a={expression})[TOOL_CALLS]f{{"a": {expression}}}'
    )
