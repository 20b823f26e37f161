# SPDX-License-Identifier: MIT
"""Structural tags: grammars of free text with constrained parts between marks, as in vLLM and xgrammar.

In vLLM's older notation, one of `structures` (`begin`, `schema`, `end`) must follow wherever one of `triggers` appears;
xgrammar's newer one is a tree of formats. Free text is matched lazily up to a mark, so that a mark always ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llguidance import regex_to_lark

from candle_vllm.core.sampling.json_schema import Budget
from candle_vllm.core.sampling.lark import ANY_TEXT, Grammar, Literals, is_token, json_grammar, user_grammar
from candle_vllm.core.sampling.structured import StructuredOutputsParams, parsed_json, refused

MAX_TAGS = 1_000
MAX_FORMATS = 5_000
MAX_NESTING = 30
MAX_MARK = 4_096  # maximum characters of a mark or a fixed text
_FIELDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {  # format -> required and optional fields
    "const_string": (frozenset({"value"}), frozenset()),
    "json_schema": (frozenset({"json_schema"}), frozenset({"style"})),
    "regex": (frozenset({"pattern"}), frozenset()),
    "grammar": (frozenset({"grammar"}), frozenset()),
    "any_text": (frozenset(), frozenset()),
    "sequence": (frozenset({"elements"}), frozenset()),
    "or": (frozenset({"elements"}), frozenset()),
    "tag": (frozenset({"begin", "content", "end"}), frozenset()),
    "triggered_tags": (frozenset({"triggers", "tags"}), frozenset({"at_least_one", "stop_after_first"})),
    "tags_with_separator": (frozenset({"tags", "separator"}), frozenset({"at_least_one", "stop_after_first"})),
}


def structural_tag_grammars(
    spec: StructuredOutputsParams, name: str, literals: Literals, budget: Budget
) -> list[Grammar]:
    """Return the grammars of `spec.structural_tag`; the first one is called `name`.

    Raises InvalidParameterError if the tag is invalid, or has an unsupported format.
    """
    assert spec.structural_tag is not None
    tag = parsed_json("structural_tag", spec.structural_tag)
    if not isinstance(tag, dict):
        raise refused("structural_tag must be an object")
    writer = _Writer(spec, name, literals, budget)
    return writer.grammars(_older(tag) if "structures" in tag or "triggers" in tag else _newer(tag))


def _older(tag: dict[str, Any]) -> dict[str, Any]:
    _check_fields(tag, "structural_tag", frozenset({"structures", "triggers"}), frozenset({"type"}))
    if not isinstance(tag["structures"], list):
        raise refused("structural_tag: structures must be a list")
    tags = []
    for one in tag["structures"]:
        _check_fields(one, "a structure", frozenset({"begin", "end"}), frozenset({"schema"}))
        schema = True if one.get("schema") is None else one["schema"]
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": one["begin"], "content": content, "end": one["end"]})
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


def _newer(tag: dict[str, Any]) -> dict[str, Any]:
    _check_fields(tag, "structural_tag", frozenset({"type", "format"}), frozenset())
    if tag["type"] != "structural_tag":
        raise refused(f"structural_tag has the type {tag['type']!r:.80}; it must be 'structural_tag'")
    return tag["format"]


class _Writer:
    """Writer of one grammar's rules, and of the grammars that they refer to."""

    def __init__(self, spec: StructuredOutputsParams, name: str, literals: Literals, budget: Budget) -> None:
        self._spec = spec
        self._name = name
        self._literals = literals
        self._rules: list[str] = []
        self._others: list[Grammar] = []
        self._formats = 0
        self._budget = budget
        self._free = {"TEXT"}  # names of rules that may end with free text

    def grammars(self, root: Any) -> list[Grammar]:
        """Return the grammar of a format, then the grammars that it refers to."""
        start = self._format(root, 0)
        text = "\n".join([f"start: {start}", *self._rules, f"TEXT: {ANY_TEXT}"])
        return [{"name": self._name, "lark_grammar": text}, *self._others]

    def _format(self, data: Any, depth: int) -> str:
        """Return a format as a Lark expression."""
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in _FIELDS:
            raise refused(f"structural_tag has the format {kind!r:.80}; supported are {', '.join(_FIELDS)}")
        _check_fields(data, f"the format {kind}", _FIELDS[kind][0] | {"type"}, _FIELDS[kind][1])
        self._formats += 1
        if self._formats > MAX_FORMATS or depth > MAX_NESTING:
            raise refused(f"structural_tag has over {MAX_FORMATS} formats, or one inside over {MAX_NESTING} others")
        if kind == "any_text":
            return "TEXT"
        if kind in ("const_string", "json_schema", "regex", "grammar"):
            return self._leaf(kind, data)
        if kind == "sequence":
            return self._sequence(_list(data, "elements"), depth)
        if kind == "or":
            return self._rule(*(self._format(part, depth + 1) for part in _list(data, "elements")))
        if kind == "tag":
            return f"{self._mark(data, 'begin')} {self._rest_of_tag(data, depth)}"
        return self._triggered(data, depth) if kind == "triggered_tags" else self._separated(data, depth)

    def _leaf(self, kind: str, data: dict[str, Any]) -> str:
        name = f"{self._name}_{len(self._others)}"
        if kind == "const_string":
            return self._mark(data, "value")
        if kind == "json_schema":
            if data.get("style", "json") != "json":
                raise refused(f"structural_tag: the style {data['style']!r:.80} is not supported; leave it out")
            self._others.append(json_grammar(name, data["json_schema"], self._spec, self._budget))
            return f"@{name}"
        text = _string(data, "pattern" if kind == "regex" else "grammar")
        if kind == "regex":
            return self._rule(f"/{regex_to_lark(text, '')}/")
        self._others.append(user_grammar(name, text, self._spec, self._budget))
        return f"@{name}"

    def _sequence(self, elements: list[Any], depth: int) -> str:
        """Return a sequence. Free text must be followed by a fixed text, which ends it, or be at its end."""
        found = list[str]()
        for part in elements:
            if not found or not self._ends_free(found[-1]):
                found.append(self._format(part, depth + 1))
            elif found[-1] == "TEXT" and isinstance(part, dict) and part.get("type") in ("const_string", "tag"):
                _check_fields(part, f"the format {part['type']}", _FIELDS[part["type"]][0] | {"type"}, frozenset())
                found[-1] = self._until(_string(part, "value" if part["type"] == "const_string" else "begin"))
                if part["type"] == "tag":
                    found.append(self._rest_of_tag(part, depth))
            else:
                raise refused(
                    "structural_tag: any_text in a sequence must be the last, or before a const_string or tag; another "
                    "format that may end with free text must be the last"
                )
        return self._rule(" ".join(found))

    def _rest_of_tag(self, tag: dict[str, Any], depth: int) -> str:
        """Return the expression of a tag's content and end, without its begin mark."""
        content, end = tag["content"], tag["end"]
        ends = end if isinstance(end, list) else [end]
        if not ends or not all(isinstance(text, str) and len(text) <= MAX_MARK for text in ends):
            raise refused(f"structural_tag: the end of a tag must be a text of up to {MAX_MARK} characters, or several")
        inside = self._format(content, depth + 1)
        if ends == [""]:
            return inside
        if inside == "TEXT":
            if "" in ends:
                raise refused("structural_tag: a tag of any_text has an empty end and another end: give one of them")
            return self._rule(*map(self._until, ends))
        if self._ends_free(inside):
            raise refused("structural_tag: content that may end with free text has no end, unless it is any_text alone")
        return f"{inside} {self._rule(*map(self._literals.expression, ends))}"

    def _triggered(self, data: dict[str, Any], depth: int) -> str:
        triggers = [_short(text, "a trigger") for text in _list(data, "triggers")]
        rests: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        starts = []
        for tag in self._tags(data):
            begin = _string(tag, "begin")
            trigger = min((text for text in triggers if begin.startswith(text)), key=len, default=None)  # seen first
            if trigger is None:
                raise refused(f"structural_tag: the tag {begin!r:.80} begins with none of the triggers")
            rest = self._rule(self._rest_of_tag(tag, depth + 1))
            rests[trigger].append(f"{self._literals.expression(begin[len(trigger) :])} {rest}")
            starts.append(f"{self._literals.expression(begin)} {rest}")
        found = [f"{self._until(text)} {self._rule(*parts)}" for text, parts in rests.items() if parts]
        tags, at_once = self._rule(*found), self._rule(*starts)
        must, once = _flag(data, "at_least_one"), _flag(data, "stop_after_first")
        if once:
            return at_once if must else self._rule(tags, "TEXT")
        return self._rule(f"{at_once} {tags}* TEXT" if must else f"{tags}* TEXT")

    def _separated(self, data: dict[str, Any], depth: int) -> str:
        tag = self._rule(*(self._format(tag, depth + 1) for tag in self._tags(data)))
        separator = self._mark(data, "separator")
        all_tags = tag if _flag(data, "stop_after_first") else self._rule(f"{tag} ({separator} {tag})*")
        return all_tags if _flag(data, "at_least_one") else self._rule(all_tags, '""')

    def _tags(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        tags = _list(data, "tags")
        if len(tags) > MAX_TAGS:
            raise refused(f"structural_tag has {len(tags)} tags in one place; at most {MAX_TAGS} are allowed")
        for tag in tags:
            _check_fields(tag, "a tag", frozenset({"begin", "content", "end"}), frozenset({"type"}))
            if tag.setdefault("type", "tag") != "tag":
                raise refused(f"structural_tag: where a tag should be, there is {tag['type']!r:.80}")
        return tags

    def _until(self, text: str) -> str:
        """Return the expression of free text up to and including a fixed text."""
        first, *rest = self._literals.pieces(_short(text, "a mark behind free text"))
        if is_token(first):
            return " ".join(["TEXT", first, *rest])
        return " ".join([self._rule(f"TEXT {first}", options="[lazy]"), *rest])

    def _mark(self, data: dict[str, Any], name: str) -> str:
        text = _string(data, name)
        if len(text) > MAX_MARK:
            raise refused(f"structural_tag: {name} has {len(text)} characters; at most {MAX_MARK} are allowed")
        return self._literals.expression(text)

    def _rule(self, *alternatives: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {' | '.join(alternatives)}")
        self._free |= {name} if any(map(self._ends_free, alternatives)) else set()
        return name

    def _ends_free(self, expression: str) -> bool:
        """Return whether an expression may end with free text, which nothing but a lazy rule could end."""
        return expression.rpartition(" ")[2].rstrip(")*") in self._free


def _check_fields(data: Any, what: str, needed: frozenset[str], others: frozenset[str]) -> None:
    if not isinstance(data, dict):
        raise refused(f"structural_tag: {what} must be an object")
    missing, unknown = needed - data.keys(), data.keys() - needed - others
    if missing:
        raise refused(f"structural_tag: {what} lacks {', '.join(sorted(missing))}")
    if unknown:
        raise refused(f"structural_tag: {what} has {', '.join(sorted(unknown))[:200]}, which is not supported")


def _list(data: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(data[name], list) or not data[name]:
        raise refused(f"structural_tag: {name} must be a list of at least one entry")
    return data[name]


def _string(data: dict[str, Any], name: str) -> str:
    if not isinstance(data[name], str):
        raise refused(f"structural_tag: {name} must be a text")
    return data[name]


def _short(text: Any, what: str) -> str:
    if not isinstance(text, str) or not 0 < len(text) <= MAX_MARK:
        raise refused(f"structural_tag: {what} must be a text of 1 to {MAX_MARK} characters")
    return text


def _flag(data: dict[str, Any], name: str) -> bool:
    if not isinstance(data.get(name, False), bool):
        raise refused(f"structural_tag: {name} must be true or false")
    return data.get(name, False)
