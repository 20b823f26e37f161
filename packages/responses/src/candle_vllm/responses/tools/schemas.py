# SPDX-License-Identifier: MIT
"""Checks arguments against a tool's JSON schema, which may come from an untrusted server.

Nothing is fetched: references outside of the schema allow everything. The work is limited: a schema to `MAX_SCHEMA`
bytes; a check stops at the first keyword after `CPU_SECONDS` of its thread. Patterns run in Rust's linear engine. These
are not checked: patterns that this engine does not support (lookaround, back references), patterns that are long or
meet long strings, `patternProperties` with the `additionalProperties` beside it, `unevaluatedItems`,
`unevaluatedProperties`, `format`, `uniqueItems` of long arrays, and `not` and `if` with such parts or references; such
a `oneOf` is checked as `anyOf`, or not beside one. What is not checked is allowed: a tool must check its arguments
itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from candle_vllm.core.sampling.json_rules import arguments_fault
from candle_vllm.openai.json_body import is_deeper

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

logger = logging.getLogger(__name__)

MAX_SCHEMA = 1 << 18  # bytes of JSON
MAX_SCHEMA_DEPTH = 64  # levels of nested objects and arrays
CPU_SECONDS = 1.0  # CPU time after which a check stops at its next keyword
MAX_PATTERN = 1000  # characters of a pattern
MAX_MATCHED = 2000  # characters of a string that is matched against a pattern
MAX_UNIQUE = 1000  # items of an array that is checked for duplicates
MAX_FAULTS = 5  # faults of one check that are reported
_MAX_FAULT = 300  # characters of a reported fault

_SCHEMAS_BY_NAME = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"enum", "const", "default", "examples"})
_UNCHECKED = frozenset({"$schema", "$id", "id", "patternProperties", "unevaluatedItems", "unevaluatedProperties"})
_REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_PARTLY = _REFERENCES | {"format", "pattern", "uniqueItems"}  # a check may skip these, or what they refer to
# keyword -> keyword with the part that makes it refuse arguments, if this part was not checked
_NEGATING = {"not": "not", "oneOf": "oneOf", "if": "if", "maxContains": "contains"}

Keyword = Callable[..., Iterator[Any] | None]


def schema_fault(parameters: Mapping[str, Any]) -> str | None:
    """Return why this cannot be a schema of arguments (no JSON, no object, too large or deep, wrong types), or None."""
    if not isinstance(parameters, Mapping):
        return "its parameters must be the JSON schema of an object"
    try:
        size = len(msgspec.json.encode(parameters))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return "its schema is no JSON"
    if size > MAX_SCHEMA:
        return f"its schema has {size} bytes of JSON, and {MAX_SCHEMA} are allowed"
    if is_deeper(dict(parameters), MAX_SCHEMA_DEPTH):
        return f"its schema is nested more than {MAX_SCHEMA_DEPTH} levels deep"
    if parameters.get("type", "object") not in ("object", "dict"):
        return 'its schema must have "type": "object"'
    fault = arguments_fault(dict(parameters))
    return None if fault is None else f"its schema's {fault.path or 'root':.120} {fault.text}"


class ArgumentsChecker:
    """Checks the arguments of one tool; the schema is prepared at the first check."""

    def __init__(self, parameters: Mapping[str, Any], name: str = "") -> None:
        self._parameters = parameters
        self._name = name
        self._lock = threading.Lock()
        self._deadline = 0.0
        self._validator: Validator | None = None
        self._prepared = False

    def faults(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return at most `MAX_FAULTS` faults of the arguments, a sentence each; none if they cannot be checked.

        A check can take `CPU_SECONDS`, so do not call this in the event loop's thread.
        """
        with self._lock:
            self._deadline = time.thread_time() + CPU_SECONDS
            try:
                if not self._prepared:
                    self._prepared = True
                    self._validator = self._prepare()
                if self._validator is None:
                    return []
                return [_sentence(error) for error in islice(self._validator.iter_errors(arguments), MAX_FAULTS)]
            except Exception as error:  # an untrusted schema can fail in many ways
                reason = "it takes too long" if isinstance(error, _TooLongError) else type(error).__name__
                logger.warning("arguments of the tool %.100r cannot be checked with its schema: %s", self._name, reason)
                return []

    def _prepare(self) -> Validator | None:
        """Return a validator of the part of the schema that is checked; None if the schema itself is invalid."""
        import jsonschema
        import referencing
        from jsonschema import validators

        schema = msgspec.json.decode(msgspec.json.encode(self._parameters))
        stock: Any = validators.validator_for(schema, default=validators.Draft202012Validator)
        checkable = _checkable(schema)
        try:
            stock.check_schema(checkable, format_checker=jsonschema.FormatChecker(formats=()))
        except jsonschema.SchemaError as error:
            logger.warning("the tool %.100r has a schema that is not valid: %.300s", self._name, error.message)
            return None
        keywords: dict[str, Keyword] = {**stock.VALIDATORS, "pattern": _pattern_keyword(), "uniqueItems": _unique_items}
        guarded: Any = validators.extend(stock, {name: self._guarded(keyword) for name, keyword in keywords.items()})
        return guarded(checkable, registry=referencing.Registry())

    def _guarded(self, keyword: Keyword) -> Keyword:
        def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
            if time.thread_time() > self._deadline:
                raise _TooLongError
            return keyword(validator, value, instance, schema)

        return checked


class _TooLongError(Exception):
    """The check exceeded its CPU time."""


def _checkable(schema: Any, also: frozenset[str] = frozenset()) -> Any:
    """Return the schema without the parts that are not checked, and without the keywords in `also`."""
    if isinstance(schema, list):
        return [_checkable(item, also) for item in schema]
    if not isinstance(schema, dict):
        return schema
    unchecked = _UNCHECKED | also | ({"additionalProperties"} if "patternProperties" in schema else frozenset())
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            result[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            result[key] = {name: _checkable(inner, also) for name, inner in value.items()}
        elif key in _NEGATING and not also and _checkable(part := schema.get(_NEGATING[key]), _PARTLY) != part:
            if key == "oneOf" and "anyOf" not in schema:
                result["anyOf"] = _checkable(value)
        elif key not in unchecked and (key not in _REFERENCES or (isinstance(value, str) and value.startswith("#"))):
            result[key] = _checkable(value, also)
    return result


def _pattern_keyword() -> Keyword:
    from jsonschema import ValidationError
    from pydantic_core import SchemaError, SchemaValidator, core_schema
    from pydantic_core import ValidationError as Mismatch

    compiled: dict[str, SchemaValidator | None] = {}

    def pattern_keyword(_validator: Any, pattern: Any, instance: Any, _schema: Any) -> Iterator[Any]:
        if not isinstance(instance, str) or len(instance) > MAX_MATCHED or len(pattern) > MAX_PATTERN:
            return
        if pattern not in compiled:
            try:
                compiled[pattern] = SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))
            except SchemaError:
                compiled[pattern] = None
        matcher = compiled[pattern]
        if matcher is None:
            return
        try:
            matcher.validate_python(instance)
        except Mismatch:
            yield ValidationError(f"{instance!r} does not match {pattern!r}")

    return pattern_keyword


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
    from jsonschema import validators

    if isinstance(instance, list) and len(instance) > MAX_UNIQUE:
        return None
    return validators.Draft202012Validator.VALIDATORS["uniqueItems"](validator, wanted, instance, schema)


def _sentence(error: Any) -> str:
    """Return an error's path and message as a sentence for a model."""
    place = ""
    for step in islice(error.absolute_path, 20):
        place += f"[{step}]" if isinstance(step, int) else f".{step:.80}" if place else f"{step:.80}"
    message = error.message
    if len(message) > _MAX_FAULT:
        message = f"{message[:_MAX_FAULT]}..."
    return f"{place}: {message}" if place else message
