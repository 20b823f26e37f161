# SPDX-License-Identifier: MIT
"""Errors for unknown arguments: suggest the closest name, or the equivalent of another library's name.

The names of other libraries are rows of `foreign_names.md`, below headings such as "EngineConfig", "LLM attributes",
"Arguments of methods" and "Imports".
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args, get_type_hints

import msgspec

from candle_vllm.core.foreign_names import Row, foreign_tables
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.core.shown import ShownStruct

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def foreign_names(owner: str) -> Mapping[str, str]:
    """Return the hint for each foreign name that `owner` lacks; `owner` is a table's heading or the name of a method.

    A hint begins with the equivalent name of this library, if there is one.
    """
    return {name: row[2] for row in _rows(owner) for name in row[0].split()}


def has_no_effect(owner: str, name: str, value: object) -> bool:
    """Whether `owner` may ignore an unknown argument: its table allows the value, or any ("*", which is logged)."""
    harmless = _harmless(owner).get(name, ())
    if "*" in harmless:
        logger.warning("%s has no effect here: %s", name, foreign_names(owner)[name])
        return True
    return any(type(value) is type(each) and value == each for each in harmless)


@functools.cache
def _harmless(owner: str) -> Mapping[str, Sequence[object]]:
    return {name: json.loads(f"[{row[1]}]") for row in _rows(owner) for name in row[0].split()}


def unknown_name(owner: str, name: str, known: Iterable[str], within: Mapping[str, Iterable[str]] | None = None) -> str:
    """Return the error text for an unknown argument of a class or method `owner`, which has the arguments `known`.

    `within` are fields of classes that `owner` accepts, by class, which may have the name.
    """
    known = list(known)
    head = f"{owner} has no argument {name[:60]!r}"
    for other, fields in (within or {}).items():
        if name in fields:
            return f"{head}: it is a field of {other}"
    answer = foreign_names(owner).get(name)
    if answer is not None:
        called = "it is called " if answer.partition(",")[0].partition(":")[0] in known else ""
        return f"{head}: {called}{answer}"
    for other, fields in (within or {}).items():
        if name in foreign_names(other):
            return f"{head}: {unknown_name(other, name, fields)}"
    return f"{head}{nearest(name[:60], known)}"


def missing_name(module: str, name: str, known: Iterable[str]) -> Exception:
    """Return the exception of a package's `__getattr__` for an unknown name; `known` are the package's names.

    For `from module import name` Python discards the text of an `AttributeError`. So for this statement, which is
    recognised by the calling function of importlib, an ImportError is returned if there is a hint and no submodule.
    """
    known = list(known)
    ours = next((row[2] for row in foreign_tables()["Imports"] if name in row[0].split()), None)
    hint = f": the name here is {ours}" if ours in known else nearest(name[:60], known)
    if ours is not None and " " in ours:
        hint = f": {ours}"
    if sys._getframe(2).f_code.co_name != "_handle_fromlist" or not hint:
        return AttributeError(f"module {module!r} has no attribute {name[:60]!r}{hint}", name=name)
    if importlib.util.find_spec(f"{module}.{name}") is not None:
        return AttributeError(name)  # a module, which is imported next
    return ImportError(f"cannot import name {name[:60]!r} from {module!r}{hint}", name=module)


class _Explaining(type):
    """Metaclass whose classes explain unknown arguments, and ignore those for which `has_no_effect` is true."""

    if not TYPE_CHECKING:  # type checkers see the class's own signature

        def __call__(cls, *arguments: Any, **named: Any) -> Any:
            try:
                return super().__call__(*arguments, **named)
            except TypeError:
                wanted = {name: value for name, value in named.items() if not has_no_effect(cls.__name__, name, value)}
                if len(wanted) < len(named):
                    return cls(*arguments, **wanted)
                fields = getattr(cls, "__struct_fields__", None)
                known = fields or inspect.signature(cls.__init__).parameters
                for name in named:
                    if name not in known:
                        raise TypeError(unknown_name(cls.__name__, name, known)) from None
                if fields and arguments and not cls.__match_args__:
                    names = ", ".join(fields[:4])
                    raise TypeError(f"{cls.__name__} takes its arguments by name ({names}, ...)") from None
                raise


class _ExplainingAttributes(ABCMeta):
    if not TYPE_CHECKING:  # a type checker would accept every name

        def __getattr__(cls, name: str) -> Any:
            return _attribute(cls.__name__, name, cls)


class ExplainedAttributes(metaclass=_ExplainingAttributes):
    """Base of classes that know the attributes of other libraries: as aliases, or as hints in the error."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return _attribute(type(self).__name__, name, self)


def _attribute(owner: str, name: str, asked: object) -> Any:
    """Return the attribute for which `name` is an alias; raise AttributeError with the table's hint, if it has one."""
    answer = foreign_names(f"{owner} attributes").get(name)
    if answer is not None and answer.isidentifier():
        return getattr(asked, answer)
    said = f": {answer}" if answer else ""
    raise AttributeError(f"{owner} has no {name[:60]!r}{said}", name=name, obj=asked)


class ExplainedSettings(metaclass=_Explaining):
    """Base of dataclasses that explains unknown arguments."""


class _ExplainingStruct(_Explaining, msgspec.StructMeta):
    pass


class ExplainedStruct(ShownStruct, metaclass=_ExplainingStruct, frozen=True):
    """Base of structs that explains unknown arguments."""


def explained(hint: str = "", /, **within: Iterable[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a method explain unknown arguments.

    `hint`, such as a right call, is added to the error for missing or too many arguments; `within`: see `unknown_name`.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        known = _names(method)

        @functools.wraps(method)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            for name in named:
                if name not in known:
                    raise TypeError(unknown_name(method.__name__, name, known, within))
            try:
                return method(*arguments, **named)
            except TypeError as error:
                if not _is_call_error(method, arguments, named):
                    raise
                why = str(error).replace(method.__qualname__, method.__name__)
                said = f"{method.__name__} takes {', '.join(known)}: {why}"
                raise TypeError(f"{said}; {hint}" if hint else said) from None

        return call

    return decorate


def _names(method: Callable[..., Any]) -> list[str]:
    """Return the arguments of a method, including those of a TypedDict that it unpacks."""
    names = []
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            names += get_type_hints(get_args(get_type_hints(method)[name])[0])
        elif name != "self":
            names.append(name)
    return names


def _is_call_error(method: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(method).bind(*arguments, **named)
    except TypeError:
        return True
    return False


def refuse_lost(
    owner: str,
    given: Iterable[str],
    known: Iterable[str],
    variables: Iterable[str],
    within: Mapping[str, Iterable[str]],
) -> None:
    """Raise TypeError for a chat template variable that the template does not read: it would have no effect.

    `given` are the names in a call, `variables` those that the template reads; for the others see `unknown_name`.
    """
    taken = {*known, *variables}
    for name in given:
        if name not in taken:
            said = unknown_name(owner, name, taken, within)
            if not said.startswith(f"{owner} has no argument {name[:60]!r}:"):
                said += ", and the model's chat template does not read it; to pass it anyway, use chat_template_kwargs"
            raise TypeError(said)


def _rows(owner: str) -> Sequence[Row]:
    return foreign_tables().get(owner) or (foreign_tables()["Arguments of methods"] if owner.islower() else ())
