# SPDX-License-Identifier: MIT
"""What a kernel's key depends on: its own module and all that this module imports, and nothing else."""

from __future__ import annotations

import ast
import dis
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from candle_vllm.core.kernels.cpu_runtime import kernel_cache, travelling
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import (
    CORE,
    NO_CODE,
    code_hash,
    kept_name,
    parse_imports,
    sources,
)
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_level
from candle_vllm.core.kernels.cpu_runtime.operation import named_function

PACKAGE = "candle_vllm.core"
KERNELS = sorted({code.partition(":")[0] for code, _ in travelling.functions(~Isa.GENERIC)})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    forget()
    yield
    forget()


def forget() -> None:
    """Has everything about sources read anew."""
    for name in ("kernel_cache", "_key", "_source", "_source_path", "_known_imports"):
        getattr(kernel_cache, name).cache_clear()
    kernel_cache._PARSED.clear()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's sources, to be changed."""
    folder = tmp_path_factory.mktemp("sources") / "candle_vllm" / "core"
    shutil.copytree(CORE, folder, ignore=shutil.ignore_patterns("__pycache__", "compiled", "*.pyc"))
    return folder


# ---- a second way to the same answer: the bytecode that the sources are compiled to ----------------------------------


@cache
def modules(core: Path) -> dict[str, Path]:
    found = {}
    for path in core.rglob("*.py"):
        parts = path.relative_to(core).with_suffix("").parts
        found[".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imported(code: CodeType) -> Iterator[str]:
    """The names that bytecode imports, with names inside of them."""
    imports = dis.opmap["IMPORT_NAME"] in code.co_code[::2]  # most functions have none, and disassembling takes long
    steps = list(dis.get_instructions(code)) if imports else []
    for before, step in itertools.pairwise(steps):
        if step.opname == "IMPORT_NAME":
            yield step.argval
            yield from (f"{step.argval}.{name}" for name in before.argval or ())
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from imported(inner)


@cache
def dependants(core: Path) -> dict[str, set[str]]:
    """Of each module of core the kernels whose key has to change with it, found from the module upwards."""
    found = modules(core)
    importers: dict[str, set[str]] = {name: set() for name in found}
    for name, path in found.items():
        if name in NO_CODE:
            continue
        text = path.read_text().replace("if TYPE_CHECKING:", "if False:")  # which Python leaves out
        for other in imported(compile(text, str(path), "exec")):
            if other in importers:
                importers[other].add(name)

    def above(name: str) -> set[str]:
        reached, left = {name}, [name]
        while left:
            left = [
                up for down in left for up in importers[down] if "triton" not in up.split(".")[-1] and up not in reached
            ]
            reached.update(left)
        return reached

    reached = {name: above(name) for name in found if not name.split(".")[-1].startswith("triton")}
    for name, path in found.items():
        if path.name == "__init__.py" and name != PACKAGE:  # Python runs it on the way to what is below
            reached[name].update(*(ups for below, ups in reached.items() if below.startswith(f"{name}.")))
    everywhere = kernel_cache.__name__  # compiles them all
    wanted = {f"{PACKAGE}.kernels.{kernel}": kernel for kernel in KERNELS}
    return {
        name: set()
        if name in NO_CODE
        else set(KERNELS)
        if everywhere in ups
        else {wanted[up] for up in ups if up in wanted}
        for name, ups in reached.items()
    }


def test_a_change_of_a_module_changes_the_keys_of_exactly_its_dependants(copy: Path) -> None:
    """All modules change at once: a kernel's sources say for each module whether it counts."""
    expected, found = dependants(copy), modules(copy)

    def find() -> dict[str, dict[str, str]]:
        kernel_cache._source.cache_clear()
        return {kernel: sources(kernel, copy) for kernel in KERNELS}

    before = find()
    tried = {
        name: path.read_bytes()
        for name, path in found.items()
        if name.startswith((f"{PACKAGE}.kernels", f"{PACKAGE}.quantization")) or name.count(".") == 2
    }
    assert len(tried) > 150
    for name, text in tried.items():
        found[name].write_bytes(text + b"\nCHANGED = 1\n")
    try:
        after = find()
    finally:
        for name, text in tried.items():
            found[name].write_bytes(text)
        kernel_cache._source.cache_clear()
    changed = {
        name: {kernel for kernel in KERNELS if before[kernel].get(name) != after[kernel].get(name)} for name in tried
    }
    assert changed == {name: expected.get(name, set()) for name in tried}


def test_a_change_of_one_kernel_leaves_most_others_alone(copy: Path) -> None:
    expected = dependants(copy)
    for kernel in ("position_scale.cpu", "sampling.cpu_chain", "moe.cpu", "weight_quant.cpu"):
        assert expected[f"{PACKAGE}.kernels.{kernel}"] == {kernel}
    assert expected[f"{PACKAGE}.kernels.packed_linear.grids"] < set(KERNELS)
    for module in ("kernels.cpu_runtime.compiler", "kernels.cpu_runtime.level", "kernels.cpu_runtime.kernel_cache"):
        assert expected[f"{PACKAGE}.{module}"] == set(KERNELS)
    # Numbers of the file formats stand in the code of products.
    assert {"packed_linear.cpu", "weight_quant.cpu"} <= expected[f"{PACKAGE}.quantization.ggml_types"]
    assert not expected[f"{PACKAGE}.config"]  # where every new option would make all kernels again


def test_kernels_take_no_numbers_or_texts_from_modules_that_do_not_count() -> None:
    used = {name for kernel in KERNELS for name in sources(kernel)}
    taken = {
        f"{node.module}.{alias.name}": getattr(importlib.import_module(node.module), alias.name)
        for name in used
        for node in ast.walk(ast.parse(modules(CORE)[name].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module in NO_CODE
        for alias in node.names
    }
    assert len(taken) > 3
    plain = {name for name, value in taken.items() if isinstance(value, int | float | str | bytes | tuple)}
    assert plain == {f"{PACKAGE}.threads.STACK_BYTES"}  # in an error message


def test_prose_changes_no_key() -> None:
    code = b'"""Doc."""\nX = "# no comment"\ndef f(a):  # why\n    """Doc\n\n    # of f."""\n    # more\n    return a'
    bare = b'"""Other."""\n"""Of X."""\nX = "# no comment"  # \xc3\xa4\ndef f(a):\n    """x"""\n    return a'
    assert code_hash(code) == code_hash(bare)
    for before, after in (
        (b"# no comment", b"# a text"), (b"return a", b"return -a"), (b'    return', b'    x = """\n"""\n    return'),
        (b'"""Doc."""', b'"""Doc."""; Y = 1'), (b'    """Doc\n\n    # of f."""\n', b'    if a: """Doc"""\n'),
    ):  # fmt: skip
        assert before in code
        assert code_hash(code.replace(before, after)) != code_hash(code)
    assert code_hash(b'X = """a\n\nb"""\n') != code_hash(b'X = """a\nb"""\n')
    assert code_hash(b"X = '\xc3\xa4'  # a\n") == code_hash(b"X = '\xc3\xa4'\n")


# ---- and a third: what really runs -----------------------------------------------------------------------------------


def files_reached(start: object) -> set[str]:
    """Files of all functions, classes and modules of core that a kernel's Python can reach by its names."""
    files, seen, left = set[str](), set[int](), [start]
    for thing in left:  # which grows
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, FunctionType):
            if not thing.__code__.co_filename.startswith(str(CORE)):
                continue
            files.add(thing.__code__.co_filename)
            codes = [thing.__code__]
            for code in codes:
                codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
                left += [thing.__globals__[name] for name in code.co_names if name in thing.__globals__]
            left += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif isinstance(thing, ModuleType):
            files.update(path for path in [getattr(thing, "__file__", None)] if path and path.startswith(str(CORE)))
        elif isinstance(thing, type):
            left += [sys.modules[thing.__module__], *vars(thing).values(), *thing.__bases__]
        elif isinstance(thing, tuple | list):
            left += thing
        elif isinstance(thing, Mapping):
            left += thing.values()
        else:  # functions that Numba has wrapped, cached ones, and objects of classes
            left += [getattr(thing, name, None) for name in ("py_func", "_defn", "__wrapped__")]
            left += [type(thing)] if type(thing).__module__.startswith(PACKAGE) else []
    return files


def test_all_code_that_a_kernel_is_made_from_counts_in_its_key() -> None:
    names, outside = {str(path): name for name, path in modules(CORE).items()}, dict[str, set[str]]()
    for code, constants in travelling.functions(~Isa.GENERIC):
        kernel, ran = code.partition(":")[0], set[str]()
        importlib.import_module(f"{PACKAGE}.kernels.{kernel}")
        sys.setprofile(lambda frame, event, _: ran.add(frame.f_code.co_filename))  # noqa: B023
        try:
            function = named_function(code, *constants)[1]()
        finally:
            sys.setprofile(None)
        used = {names[file] for file in ran | files_reached(function) if file in names}
        assert f"{PACKAGE}.kernels.{kernel}" in used
        if missing := used - sources(kernel).keys() - NO_CODE:
            outside[kernel] = missing
    assert outside == {}


# ---- statements ------------------------------------------------------------------------------------------------------


def test_imports_are_seen_wherever_they_stand() -> None:
    text = """
        from __future__ import annotations
        import numpy, candle_vllm.core.a.b as c
        import candle_vllm.core.only
        from candle_vllm.core.d import (  # names (some)
            e,
            f as g,
        )
        from . import h
        from ..i import j
        from candle_vllm.core.k import *
        from candle_vllm.openai import no
        TEXT = "import candle_vllm.core.no"
        try:
            from candle_vllm.core import first
        except ImportError:
            from candle_vllm.core import second
        else:
            from candle_vllm.core import third
        finally:
            from candle_vllm.core import fourth
        if TYPE_CHECKING:
            from candle_vllm.core import no
        elif TEXT: from candle_vllm.core import fifth; import candle_vllm.core.sixth
        else:
            from candle_vllm.core import seventh
        class C:
            @property
            def f(self):
                for _ in ():
                    with self:
                        from candle_vllm.core import eighth
                match self:
                    case 1:
                        async def g():
                            while True:
                                from candle_vllm.core import \\
                                    ninth
        """
    found = {base: set(names) for base, names in parse_imports(textwrap.dedent(text).encode()).items()}
    of_core = {"first", "second", "third", "fourth", "fifth", "seventh", "eighth", "ninth"}
    assert found == {
        PACKAGE: of_core,
        **{f"{PACKAGE}.{name}": set[str]() for name in ("a", "a.b", "only", "sixth")},
        f"{PACKAGE}.d": {"e", "f"},
        f"{PACKAGE}.k": {"*"},
        ".": {"h"},
        "..i": {"j"},
    }


def test_relative_imports_are_followed(tmp_path: Path) -> None:
    names = ("__init__", "kernels/__init__", "kernels/cpu_runtime/__init__", "kernels/cpu_runtime/kernel_cache")
    for name in (*names, "kernels/k/__init__", "kernels/k/other", "kernels/tables/__init__", "kernels/tables/inner"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "kernels/k/cpu.py").write_text("from . import other\nfrom ..tables import inner, NUMBER\n")
    (tmp_path / "kernels/tables/__init__.py").write_text("from .lazy import NUMBER\n")
    (tmp_path / "kernels/tables/lazy.py").write_text("from candle_vllm.core.nowhere import no\nNUMBER = 1\n")
    kernels = f"{PACKAGE}.kernels"
    assert set(sources("k.cpu", tmp_path)) == {
        kernels,
        *(f"{kernels}.{name}" for name in ("cpu_runtime", "cpu_runtime.kernel_cache", "k", "k.cpu", "k.other")),
        *(f"{kernels}.{name}" for name in ("tables", "tables.inner", "tables.lazy")),
    }


def test_a_kernel_without_a_source_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"kernels\.nothing\.here"):
        sources("nothing.here")


# ---- while sources change, and what is noted -------------------------------------------------------------------------


def test_sources_that_change_while_a_process_runs_are_of_use_to_it_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy / "kernels" / "position_scale" / "cpu.py"
    begun = path.stat().st_ctime
    found = []
    for since in (begun + 1, begun - 1, begun - 2):  # a process that began after the change, and two before
        monkeypatch.setattr(kernel_cache, "_BEGUN", since)
        kernel_cache._source.cache_clear()
        found.append(sources("position_scale.cpu", copy)[f"{PACKAGE}.kernels.position_scale.cpu"])
    assert len(set(found)) == 3
    assert len(found[0]) == 64


def test_code_is_not_kept_if_a_source_changed_while_it_was_compiled(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "sources", partial(sources, core=copy))
    name, (module, other) = (
        "position_scale.cpu.position_scale",
        (copy / "kernels" / kind / "cpu.py" for kind in ("position_scale", "moe")),
    )
    (tmp_path / "kept").mkdir()
    for path, kept in ((module, []), (other, [kept_name(name, host_level())])):
        kept_name(name, host_level())
        text = path.read_bytes()
        path.write_bytes(text + b"\nCHANGED = 1\n")
        kernel_cache.keep_kernel(tmp_path / "kept", name, host_level(), b"code")
        path.write_bytes(text)
        kernel_cache._source.cache_clear()
        kernel_cache._key.cache_clear()
        assert [each.name for each in (tmp_path / "kept").iterdir()] == kept


def test_a_file_is_parsed_once_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{kernel}.function" for kernel in KERNELS[:5]]
    kept = [kept_name(name, host_level()) for name in names]
    parsed: list[bytes] = []
    real = parse_imports

    def noted(text: bytes) -> dict[str, list[str]]:
        parsed.append(text)
        return real(text)

    monkeypatch.setattr(kernel_cache, "parse_imports", noted)
    forget()
    assert [kept_name(name, host_level()) for name in names] == kept
    assert parsed == []
    folder = kernel_cache.kernel_cache()
    assert folder is not None
    (folder.parent / "imports").write_bytes(b"damaged")
    forget()
    assert [kept_name(name, host_level()) for name in names] == kept
    assert len(parsed) == len(set(parsed)) > 10


def test_notes_of_processes_that_parse_at_once_are_kept_together() -> None:
    kept_name("position_scale.cpu.function", host_level())
    path = kernel_cache._imports_path()
    assert path is not None
    ours = dict(kernel_cache._known_imports(path))
    kernel_cache.keep(path, json.dumps({"another's": {}}).encode())
    kept_name("moe.cpu.function", host_level())  # of which this process has to parse some files
    noted = kernel_cache._known_imports(path)
    assert "another's" in noted
    assert len(noted) > 1
    assert not noted.keys() & ours.keys()  # those were lost, and are parsed by the next process
    forget()
    kept_name("position_scale.cpu.function", host_level())
    assert kernel_cache._known_imports(path) == noted | ours


def test_where_nothing_can_be_compiled_no_cache_folder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """For precompiled kernels without their notes: the sources are parsed at every start."""
    name = f"{KERNELS[0]}.function"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernel_cache, "has_compiler", lambda: False)
        kept = kept_name(name, host_level())
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()
    forget()
    assert kept_name(name, host_level()) == kept


# ---- whole processes -------------------------------------------------------------------------------------------------

_RUN = """
import sys
from candle_vllm.core.kernels.cpu_runtime import kernel_cache
from candle_vllm.core.kernels.cpu_runtime.operation import operation
assert str(kernel_cache.CORE) == sys.argv[1], kernel_cache.CORE
names, real = [], kernel_cache.compile_image
kernel_cache.compile_image = lambda function, level: (names.append(function.__name__), real(function, level))[1]
for code in ("column_order.cpu:column_order", "position_scale.cpu:position_scale"):
    assert operation(code) != 0
print(*names)
"""


@pytest.mark.every_case
def test_a_changed_kernel_is_compiled_anew_and_no_other(copy: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy.parents[1]), "XDG_CACHE_HOME": str(tmp_path)}

    def compiled() -> list[str]:
        program = [sys.executable, "-c", _RUN, str(copy)]
        done = subprocess.run(program, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert compiled() == ["column_order", "position_scale"]
    path = copy / "kernels" / "position_scale" / "cpu.py"
    text = path.read_bytes()
    path.write_bytes(text + b"\n# changed\n")
    assert compiled() == []
    path.write_bytes(text + b"\nCHANGED = 1\n")
    assert compiled() == ["position_scale"]
    path.write_bytes(text)  # and whoever goes back to another branch finds its kernels
    assert compiled() == []
