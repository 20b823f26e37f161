# SPDX-License-Identifier: MIT
"""What may come back: the answer of a quiet server, or a refusal that was asked for. Anything else is a fault."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.answers import error_of, essence, events, folded, usage_of
from tests.chaos.samples import Sample
from tests.chaos.wire import Answer

MAX_FAULTS = 20  # that are kept
_TOO_MANY = re.compile(r"(\d+) sequences are running or waiting,? and (?:at most )?(\d+) (?:may be|are allowed)")
_TOO_MANY_OF_KEY = re.compile(r"This key has (\d+) sequences running or waiting and may have (\d+)")
_TOO_MANY_WAIT = re.compile(r"(\d+) of at most (\d+) requests( of this API key)? wait for the model")
_DEAD = "The engine has stopped"
_REFUSING = (503, 529)  # the second one is Anthropic's


@dataclass(frozen=True)
class Limits:
    """Those that the server was started with."""

    sequences: int
    sequences_per_key: int
    waiting: int


@dataclass
class Judge:
    """Compares answers with those of the quiet server and keeps count.

    Attributes:
        expected: status and essence of each sample's answer.
        deaths: `time.monotonic()` of each kill of an engine.
        mercy: seconds after a death in which requests may end with it.
    """

    limits: Limits
    expected: dict[str, tuple[int, Any]] = field(default_factory=dict)
    deaths: list[float] = field(default_factory=list)
    mercy: float = 20.0
    faults: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)

    def learn(self, sample: Sample, answer: Answer) -> None:
        """Takes the quiet server's answer."""
        assert answer.complete, sample.name
        assert answer.status is not None, sample.name
        assert answer.status < 500, (sample.name, answer.body[:500])
        assert answer.status >= 400 or error_of(answer) is None, (sample.name, answer.body[-500:])
        self.expected[sample.name] = answer.status, essence(answer)

    def check(self, sample: Sample, answer: Answer, now: float) -> None:
        """Judges an answer that was to be read to its end."""
        try:
            self._check(sample, answer, now)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.fault(sample.name, f"{answer.status} {answer.body[:1500]!r} cannot be read: {error!r}")

    def _check(self, sample: Sample, answer: Answer, now: float) -> None:
        usage = usage_of(answer)
        if usage is not None:
            self.prompt_tokens[usage[0]] += usage[1]
            self.completion_tokens[usage[0]] += usage[2]
        if not answer.complete:
            self.fault(sample.name, f"the answer broke off: {answer.status} {answer.body[-300:]!r}")
        elif (why := self._refusal(sample, answer, now)) is not None:
            self.outcomes[f"refused: {why}"] += 1
        elif (answer.status, essence(answer)) != self.expected[sample.name]:
            self.fault(
                sample.name,
                f"{answer.status} {answer.headers} {answer.body[:1500]!r}, not {self.expected[sample.name]!r:.1500}",
            )
        else:
            self.outcomes["as expected"] += 1

    def check_part(self, sample: Sample, answer: Answer, now: float) -> None:
        """Judges as much of an answer as its client stayed for."""
        if answer.complete:
            self.check(sample, answer, now)
        elif answer.status is not None and answer.status >= 500 and answer.status not in _REFUSING:
            self.fault(sample.name, f"{answer.status} {answer.body!r:.300}")
        elif answer.status == 200 and sample.streamed:
            self._check_beginning(sample, answer)
        else:
            self.outcomes["left"] += 1

    def check_bytes(self, sent: bytes, got: bytes) -> None:
        """Judges what came back for bytes that are no request."""
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", got)]
        if any(status >= 500 for status in statuses):
            self.fault("hostile", f"{sent[:200]!r} was answered with {got[:300]!r}")
        else:
            self.outcomes[f"hostile: {statuses[0] if statuses else 'hung up'}"] += 1

    def fault(self, name: str, what: str) -> None:
        """Notes something that must not happen."""
        self.outcomes["fault"] += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{name}: {what}")

    def _check_beginning(self, sample: Sample, answer: Answer) -> None:
        """A stream that was left says the beginning of what a whole one says."""
        said, whole = folded(events(answer.body)), self.expected[sample.name][1]
        for name, part in said.items():
            if isinstance(part, dict) and "text" in part and not whole[name]["text"].startswith(part["text"]):
                self.fault(sample.name, f"{part['text']!r} does not begin {whole[name]['text']!r}")
                return
        self.outcomes["left in the middle"] += 1

    def _refusal(self, sample: Sample, answer: Answer, now: float) -> str | None:
        """Why a request was refused, where that was asked for; None where it was not refused for such a reason."""
        error = error_of(answer)
        if error is None:
            return None
        message, status = error["message"], answer.status
        if status in _REFUSING and (found := _TOO_MANY.search(message)):
            total, most = int(found[1]), int(found[2])
            asked_for = total + sample.sequences > most == self.limits.sequences
            return "queue" if asked_for and self._retry_after(answer) else None
        if status in _REFUSING and (found := _TOO_MANY_WAIT.search(message)):
            asked_for = int(found[1]) >= int(found[2]) == self.limits.waiting // (2 if found[3] else 1)
            return "waiting" if asked_for and self._retry_after(answer) else None
        if status == 429 and (found := _TOO_MANY_OF_KEY.search(message)):
            own, most = int(found[1]), int(found[2])
            asked_for = own + sample.sequences > most == self.limits.sequences_per_key
            return "key" if asked_for and self._retry_after(answer) else None
        if status in (200, 503) and message.startswith(_DEAD):
            return "death" if any(0 <= now - death <= self.mercy for death in self.deaths) else None
        return None

    @staticmethod
    def _retry_after(answer: Answer) -> bool:
        return answer.header("retry-after").isdigit() and int(answer.header("retry-after")) >= 1
