# SPDX-License-Identifier: MIT
"""`--set PATH=NUMBER`: other tiles, warps, stages and switches than a kernel's own, for one process.

PATH begins with a module below `candle_vllm.core.kernels`; what follows names, in that module,

- a whole number, or a constant of Triton's: `attention.triton_decode._CHUNK=128`, `linear.OWN_ROWS=16`;
- an entry of a table: `gguf_linear.triton.TILES.32.0.warps=2`, `moe.triton_experts.PLAIN.few.0.warps=2`;
- a field of what a function chooses, whatever it would have chosen: `attention.triton_decode.splits.programs=3`;
- an option of every launch of a kernel: `rotary_write.triton.rotary_write_kernel.num_warps=8`, or `num_stages`.

So nothing that can be tuned needs a line of its own in the kernels. `EngineConfig.NAME=NUMBER` is for those who start
an engine. What does not exist is an error that names what does. Settings hold for the process, and a constant of
Triton's comes before the first launch: a kernel that was compiled with another refuses to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

KERNELS = "candle_vllm.core.kernels"
CONFIG = "EngineConfig"
LAUNCH = ("num_warps", "num_stages")


class NoSuchSettingError(Exception):
    """A path that leads nowhere; the text names what there is."""


def parsed(settings: Iterable[str]) -> dict[str, int]:
    """PATH=NUMBER texts as a mapping.

    Raises:
        NoSuchSettingError: for a text that is no path, "=" and whole number.
    """
    found = {}
    for setting in settings:
        path, _, number = setting.partition("=")
        try:
            found[path] = int(number)
        except ValueError:
            raise NoSuchSettingError(f"{setting!r} is no PATH=NUMBER") from None
    return found


def engine_fields(settings: Mapping[str, int]) -> dict[str, Any]:
    """Those of EngineConfig, without the prefix.

    Raises:
        NoSuchSettingError: for one that EngineConfig has not.
    """
    from candle_vllm.core import EngineConfig

    wanted = {path.partition(".")[2]: number for path, number in settings.items() if path.startswith(f"{CONFIG}.")}
    there = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in wanted:
        if name not in there:
            raise NoSuchSettingError(f"{CONFIG} has no {name!r}; it has {', '.join(sorted(there))}")
    return wanted


def apply(settings: Mapping[str, int]) -> list[Callable[[], None]]:
    """Sets what lies below the kernels' package; what puts each back, the last one first.

    Raises:
        NoSuchSettingError: for a path that leads nowhere.
    """
    return [_set(path, number) for path, number in settings.items() if not path.startswith(f"{CONFIG}.")][::-1]


@contextlib.contextmanager
def tried(settings: Mapping[str, int]) -> Iterator[None]:
    """Sets them while it is entered."""
    undo = apply(settings)
    try:
        yield
    finally:
        for step in undo:
            step()


def apply_or_exit(settings: Iterable[str]) -> None:
    """PATH=NUMBER texts of a command line that starts no engine; ends the program where one leads nowhere."""
    try:
        found = parsed(settings)
        apply(found)
    except NoSuchSettingError as error:
        raise SystemExit(f"--set: {error}") from None
    if strays := [path for path in found if path.startswith(f"{CONFIG}.")]:
        raise SystemExit(f"--set: {', '.join(strays)}: no engine is started here")


def _set(path: str, number: int) -> Callable[[], None]:
    """Sets one; what puts it back."""
    module, rest = _module(path)
    if not rest or not hasattr(module, rest[0]):
        below = [name for name in map(_short, tunable_modules()) if name.startswith(f"{_short(module)}.")]
        there = ", ".join(sorted([*known(module), *below]))
        raise NoSuchSettingError(f"{path!r} leads nowhere; {_short(module)} has {there}")
    name, *keys = rest
    value = getattr(module, name)
    if _is_kernel(value):
        return _set_launch(path, value, keys, number)
    if type(value).__name__ == "constexpr" and not keys:
        new = type(value)(number)
        _replace_everywhere(name, value, new)
        return functools.partial(_replace_everywhere, name, new, value)
    if inspect.isfunction(value) or hasattr(value, "__wrapped__"):  # one with a cache, for the latter
        setattr(module, name, _choosing(path, value, keys, number))
    else:
        setattr(module, name, _changed(path, value, keys, number))
    return functools.partial(setattr, module, name, value)


def _module(path: str) -> tuple[ModuleType, list[str]]:
    """The longest module that the path begins with, and the rest of the path."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        full = ".".join([KERNELS, *names[:count]])
        try:
            there = importlib.util.find_spec(full) is not None
        except ModuleNotFoundError:  # a part of it is not there, or is no package
            there = False
        if there:
            return importlib.import_module(full), names[count:]
    modules = sorted(_short(module) for module in tunable_modules())
    raise NoSuchSettingError(f"{path!r} begins with no module below {KERNELS}; there are {', '.join(modules)}")


def _short(module: ModuleType) -> str:
    return module.__name__.removeprefix(f"{KERNELS}.")


# ---- the kinds of settings -------------------------------------------------------------------------------------------


def _changed(path: str, value: Any, keys: Sequence[str], number: int) -> Any:
    """`value` with the number at the end of `keys`; containers are made anew."""
    if not keys:
        if isinstance(value, bool) and number in (0, 1):
            return bool(number)
        if isinstance(value, bool) or not isinstance(value, int):
            raise NoSuchSettingError(f"{path!r} is no whole number: there is {_entries(value)}")
        return number
    key, *more = keys
    if isinstance(value, Mapping):
        names = {str(name): name for name in value}
        if key in names:
            return MappingProxyType({**value, names[key]: _changed(path, value[names[key]], more, number)})
    elif key in getattr(value, "_fields", ()):
        return value._replace(**{key: _changed(path, getattr(value, key), more, number)})
    elif isinstance(value, tuple) and not hasattr(value, "_fields") and key.isdigit() and int(key) < len(value):
        place = int(key)
        return (*value[:place], _changed(path, value[place], more, number), *value[place + 1 :])
    elif dataclasses.is_dataclass(value) and key in (field.name for field in dataclasses.fields(value)):
        return dataclasses.replace(value, **{key: _changed(path, getattr(value, key), more, number)})
    raise NoSuchSettingError(f"{path!r} leads nowhere: at {key!r} there is {_entries(value)}")


def _entries(value: Any) -> str:
    """What can be named below a value, for messages."""
    if dataclasses.is_dataclass(value):
        return ", ".join(field.name for field in dataclasses.fields(value))
    if hasattr(value, "_fields"):
        return ", ".join(value._fields)
    if isinstance(value, Mapping):
        return ", ".join(map(str, value))
    return f"0 to {len(value) - 1}" if isinstance(value, tuple) else repr(value)


def _choosing(path: str, function: Callable[..., Any], keys: Sequence[str], number: int) -> Callable[..., Any]:
    """The function, with a field of its result changed."""
    if not keys:
        raise NoSuchSettingError(f"{path!r} is a function: name a field of what it returns")
    fields = _result_fields(function)
    if fields and keys[0] not in fields:
        raise NoSuchSettingError(f"{path!r} leads nowhere: {function.__name__} chooses {', '.join(fields)}")

    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return _changed(path, function(*args, **kwargs), keys, number)

    return chosen


def _result_fields(function: Callable[..., Any]) -> list[str]:
    """Whole numbers of the tile that a function is annotated to choose; none where it returns anything else."""
    function = inspect.unwrap(function)
    name = function.__annotations__.get("return")
    kind = function.__globals__.get(name) if isinstance(name, str) else name
    fields = getattr(kind, "__annotations__", {}) if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields") else {}
    if not {"warps", "num_warps"} & fields.keys() or "kernel" in fields:  # the latter is a form to compile
        return []
    return [field for field, type_name in fields.items() if type_name in ("int", int)]


def _is_kernel(value: Any) -> bool:
    return type(value).__name__ in ("JITFunction", "InterpretedFunction")


def _set_launch(path: str, kernel: Any, keys: Sequence[str], number: int) -> Callable[[], None]:
    """Has every launch of a kernel take the option, wherever the kernel was imported to."""
    if len(keys) != 1 or keys[0] not in LAUNCH:
        raise NoSuchSettingError(f"{path!r} leads nowhere: a kernel has {' and '.join(LAUNCH)}")
    run = kernel.run

    def launched(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **{**kwargs, keys[0]: number})

    own = vars(kernel).get("run")  # another option's; without any, `run` is the class's
    kernel.run = launched
    return functools.partial(delattr, kernel, "run") if own is None else functools.partial(setattr, kernel, "run", own)


def _replace_everywhere(name: str, old: object, new: object) -> None:
    """A constant of Triton's, in every module that has imported it."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith(KERNELS) and getattr(module, name, None) is old:
            setattr(module, name, new)


# ---- what there is ---------------------------------------------------------------------------------------------------


def tunable_modules() -> Iterator[ModuleType]:
    """The modules with Triton kernels, and the packages that choose among them."""
    package = importlib.import_module(KERNELS)
    for found in pkgutil.walk_packages(package.__path__, f"{KERNELS}."):
        last = found.name.rpartition(".")[2]
        if last.startswith("triton") and last != "triton_build":
            yield importlib.import_module(found.name)


def known(module: ModuleType) -> list[str]:
    """Paths of a module, below it: numbers, tables, functions that choose, kernels."""
    found = []
    for name, value in vars(module).items():
        number = value.value if type(value).__name__ == "constexpr" else value
        if isinstance(number, int) and name.isupper():
            found.append(name)
        elif "TILES" in name and isinstance(value, (tuple, Mapping)):
            found += [f"{name}.{rest}" for rest in _numbers(value)]
        elif inspect.isfunction(inspect.unwrap(value) if callable(value) else value):
            found += [f"{name}.{field}" for field in _result_fields(value)]
        elif _is_kernel(value) and _is_launched(value):
            found += [f"{name}.{option}" for option in LAUNCH]
    return found


def _numbers(value: Any) -> Iterator[str]:
    """Paths to the whole numbers in a table."""
    named = value.items() if isinstance(value, Mapping) else zip(getattr(value, "_fields", range(len(value))), value)
    for key, entry in named:
        if isinstance(entry, int) and not isinstance(entry, bool):
            yield str(key)
        elif isinstance(entry, (tuple, Mapping)):
            yield from (f"{key}.{rest}" for rest in _numbers(entry))


def _is_launched(kernel: Any) -> bool:
    """Whether a function of Triton's is a kernel; others are called by kernels."""
    return kernel.fn.__name__.endswith("_kernel")
