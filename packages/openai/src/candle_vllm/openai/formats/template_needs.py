"""What a chat template can write, and how it wants messages (found out when a model is loaded)."""

from __future__ import annotations

import dataclasses

from candle_vllm.openai.formats.layout import ReasoningFormat
from candle_vllm.openai.formats.reader import SPACE
from candle_vllm.openai.formats.template_probe import (
    ARGUMENTS,
    CONTENT,
    NAME,
    OTHER_ARGUMENTS,
    RESULT,
    THOUGHTS,
    TemplateProbe,
)

_LONG_ID = "call_0123456789abcdef01234567"
_CITY, _OTHER_CITY = str(ARGUMENTS["city"]), str(OTHER_ARGUMENTS["city"])


@dataclasses.dataclass(frozen=True)
class TemplateNeeds:
    """What a template needs and can do.

    Attributes:
        writes_tools: prompts show the tools that a request offers.
        writes_calls: earlier calls are part of the prompt; where not, the model does not know that it called.
        writes_results: so are their results.
        writes_reasoning: so are the thoughts of a message that ends the conversation with calls.
        arguments_as_text: arguments must be JSON texts; otherwise they must be objects.
        parallel_calls: a message may have several calls.
        content_beside_calls: a message's content is written beside its calls.
        content_required: a message with calls must have a content, if an empty one.
        content_forbidden: a message's calls are written only where its content is null.
        short_ids: ids of calls must have nine letters or digits (Mistral).
        refusal: what the template said to the calls that it does not write; "" where it said nothing.
    """

    writes_tools: bool = False
    writes_calls: bool = False
    writes_results: bool = False
    writes_reasoning: bool = False
    arguments_as_text: bool = False
    parallel_calls: bool = False
    content_beside_calls: bool = False
    content_required: bool = True
    content_forbidden: bool = False
    short_ids: bool = False
    refusal: str = ""


def template_needs(probe: TemplateProbe) -> TemplateNeeds:
    """Finds out what a template needs; about ten renderings of a small conversation."""
    writes_tools = probe.prompt is not None and probe.plain_prompt is not None and NAME in probe.prompt
    if writes_tools:
        writes_tools = NAME not in (probe.plain_prompt or "")
    as_text = _as_text(probe)
    if as_text is None:
        bare = probe.calls(content=None)
        if bare is None or _CITY not in bare.text:
            return TemplateNeeds(writes_tools=writes_tools, refusal=probe.refusal)
        return TemplateNeeds(
            writes_tools=writes_tools, writes_calls=True, content_required=False, content_forbidden=True
        )
    two = probe.calls((ARGUMENTS, OTHER_ARGUMENTS), as_text=as_text)
    beside = probe.calls(as_text=as_text, content=CONTENT)
    thinking = probe.calls(as_text=as_text, thoughts=THOUGHTS)
    bare = probe.calls(as_text=as_text, content=None)
    result = probe.result(as_text=as_text, content="")
    return TemplateNeeds(
        writes_tools=writes_tools,
        writes_calls=True,
        writes_results=result is not None and RESULT in result,
        writes_reasoning=thinking is not None and THOUGHTS in thinking.text,
        arguments_as_text=as_text,
        parallel_calls=two is not None and _CITY in two.text and _OTHER_CITY in two.text,
        content_beside_calls=beside is not None and CONTENT in beside.text and _CITY in beside.text,
        content_required=bare is None or _CITY not in bare.text,
        short_ids=probe.calls(as_text=as_text, ids=(_LONG_ID,)) is None,
    )


def reasoning_is_open(prompt_tail: str, reasoning: ReasoningFormat | None, *, continued: bool = False) -> bool:
    """Whether a prompt leaves the thoughts open, so that the model begins within them.

    Args:
        prompt_tail: the end of the prompt, at least from the answer's beginning on.
        reasoning: how the model writes thoughts.
        continued: the prompt ends with the beginning of an answer that the model is to go on with, so that thoughts may
            have been written already.
    """
    for opening, closing in reasoning.pairs.items() if reasoning else ():
        place = prompt_tail.rfind(opening)
        rest = prompt_tail[place + len(opening) :]
        if place >= 0 and (closing not in rest if continued else not rest.strip(SPACE)):
            return True
    return False


def _as_text(probe: TemplateProbe) -> bool | None:
    """How arguments must be given; None where calls are not written either way."""
    given = probe.calls()
    if given is not None and _CITY in given.text and f"{{'{next(iter(ARGUMENTS))}'" not in given.text:
        return False
    text = probe.calls(as_text=True)
    if text is not None and _CITY in text.text:
        return True
    return False if given is not None and _CITY in given.text else None
