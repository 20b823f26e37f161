"""The one grammar of a chat answer: structured output and tool calls together, with reasoning before them (step 2)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.grammar import answer_grammar, tool_grammar
from candle_vllm.openai.formats.layout import ReasoningFormat, ToolFormat
from candle_vllm.openai.task import ToolUse


def constrain(
    structured: StructuredOutputsParams | None,
    form: ToolFormat | None,
    use: ToolUse,
    *,
    reasoning: ReasoningFormat | None,
    in_reasoning: bool,
    special: Mapping[str, int],
    loose: Collection[str] = (),
    continued: bool = False,
) -> StructuredOutputsParams | None:
    """What the text of an answer must be; None where anything will do.

    Where calls are required, structured output has nothing to say: it is about content, and there is none. Where the
    model chooses, the answer is calls or what `structured` asks for, not both.

    Args:
        structured: the form of the content, if it must have one.
        form: how the model writes calls, also where none are offered; None where that is not known.
        use: the tools and the choice among them.
        reasoning: how it writes the thoughts that may come; None where none may.
        in_reasoning: the prompt has opened the thoughts already.
        special: special tokens of the vocabulary, by name.
        loose: names of tools that are not held to their schemas.
        continued: the prompt ends within an answer, which the model is to go on with.

    Raises:
        RequestError: what is asked for cannot be guaranteed.
    """
    offered = use.tools if form is not None else ()
    if use.mode == "required" and not offered:
        raise UnsupportedParameterError(
            "tool_choice cannot be honoured: the server looks for no tool calls in this model's answers; start it "
            "with --tool-parser and the name of the format that the model writes",
            "tool_choice",
        )
    if structured is not None and use.mode != "required":
        if continued and ((form and form.flow) or (reasoning and reasoning.flow)):
            return structured  # nothing of the message but the form is left
        around = answer_grammar(
            form,
            offered,
            parallel=use.parallel,
            reasoning=reasoning,
            in_reasoning=in_reasoning,
            special=special,
            loose=loose,
        )
        if around is not None:
            return replace(structured, around=around)
        return _after_thoughts(structured, reasoning, in_reasoning)
    if form is None or not offered:
        return None
    calls = tool_grammar(
        form,
        offered,
        mode="auto" if use.mode == "auto" else "required",
        parallel=use.parallel,
        reasoning=reasoning,
        in_reasoning=in_reasoning,
        special=special,
        loose=loose,
        always=len(use.shown) > len(use.tools),  # the model is shown tools that it may not call
    )
    return None if calls is None else StructuredOutputsParams(grammar=calls)


def _after_thoughts(
    structured: StructuredOutputsParams, reasoning: ReasoningFormat | None, in_reasoning: bool
) -> StructuredOutputsParams:
    """The form, behind thoughts where the model may have some."""
    if reasoning is None:
        return structured
    start = None if in_reasoning else reasoning.open
    return replace(structured, reasoning_start=start, reasoning_end=reasoning.close)
