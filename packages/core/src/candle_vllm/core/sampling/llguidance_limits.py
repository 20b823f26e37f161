# SPDX-License-Identifier: MIT
"""Limits of llguidance's work for one form (step 7 of a request's life)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from candle_vllm.core.sampling.structured import refused

if TYPE_CHECKING:
    from llguidance import LLParserLimits

_LIMITS: Mapping[str, Any] = MappingProxyType(
    {
        "max_lexer_states": 60_000,  # of each form; a state takes up to 2 kB
        "max_grammar_size": 200_000,
        "verbose_errors": False,
    }
)
MOST_COMPILING = 10
"""Maximum seconds of a trial compilation, see `check_time`."""
_FEW = 1024  # a grammar of at most this many characters, without repetitions such as `{3,9}`, compiles in time
_COUNTED = re.compile(r"\{\d")
_TOKEN = re.compile(r"<\[[\d,^-]+\]>")
_TRIAL = """
import json, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, 2 * (int(sys.argv[2]),))
    resource.setrlimit(resource.RLIMIT_AS, 2 * (1 << 31,))
except (ImportError, OSError, ValueError):
    pass
limits = LLParserLimits(**json.loads(sys.argv[1]))
LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0, limits=limits)
"""


def limits() -> LLParserLimits:
    """Return the limits that llguidance enforces."""
    from llguidance import LLParserLimits

    return LLParserLimits(**_LIMITS)


def check_time(name: str, text: str) -> None:
    """Refuse grammars with intersections that llguidance would compile for too long, or with more than 2 GB.

    llguidance's limits do not count its work on the first byte of a terminal, for which it intersects large regular
    expressions of a user's grammar. Patterns of a schema are not affected, because they follow a quotation mark.
    """
    meets = "&" in text or "~" in text
    if meets and (len(text) > _FEW or _COUNTED.search(text)) and not _ends_in_time(text):
        raise refused(
            f"the {name} takes more than the {MOST_COMPILING} seconds or 2 GB that compiling may take: regular "
            "expressions that must hold together meet in too many ways; shorten their repetitions"
        )


def _ends_in_time(text: str) -> bool:
    """Return whether grammars compile within the limits: a trial over single bytes, in a process that can be killed.

    The compiler's errors are reported when the grammars are compiled in this process.
    """
    if getattr(sys, "frozen", False) or not sys.executable:  # it is not Python, or unknown
        return True
    known = _TOKEN.sub("<[256]>", text)  # a special token of the trial's vocabulary of bytes
    program = [sys.executable, "-P", "-c", _TRIAL, json.dumps(dict(_LIMITS)), str(MOST_COMPILING)]
    try:
        tried = subprocess.run(program, input=known.encode(), timeout=MOST_COMPILING, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode >= 0  # else a limit of the process has ended it
