# SPDX-License-Identifier: MIT
"""Prompt templates by name, and the rendering of a template to a prompt.

A template with `{{` or `{%` is Jinja, like a model's chat template; its variables are `messages`, `prompt` and
`system_prompt`. Any other template has `{prompt}` and, optionally, `{system_prompt}`.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from candle_vllm.core.errors import ChatTemplateError, InvalidParameterError

Jinja = Callable[[list[dict[str, Any]], str, dict[str, str]], str]
"""Renders messages with a template's source and further variables: `apply_chat_template` of an engine."""

COMPLETION = "{prompt}"  # the tokenizer adds the beginning-of-sequence token
LLAMA_3_INSTRUCT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system_prompt}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_2_INSTRUCT = "<s>[INST] <<SYS>>\n{system_prompt}\n<</SYS>>\n\n{prompt} [/INST]"
MISTRAL_INSTRUCT = "<s>[INST] {system_prompt}\n\n{prompt} [/INST]"
NAMED = {
    "COMPLETION": COMPLETION,
    "LLAMA_3_INSTRUCT": LLAMA_3_INSTRUCT,
    "LLAMA_2_INSTRUCT": LLAMA_2_INSTRUCT,
    "MISTRAL_INSTRUCT": MISTRAL_INSTRUCT,
}
_FIELDS = {"prompt", "system_prompt"}
_SENTINEL = "candle7f3aprompt"


class BadTemplate(ValueError):
    """A template that cannot be read or rendered."""


class IgnoresPrompt(ValueError):
    """A template that leaves the prompt out."""


def render(template: str, prompt: str, system_prompt: str, jinja: Jinja) -> str:
    """Return the prompt.

    Args:
        template: the template, or a name in `NAMED`.
        jinja: renders a Jinja template.

    Raises:
        IgnoresPrompt, BadTemplate: the template cannot be used.
    """
    template = NAMED.get(template, template)
    if _SENTINEL not in _rendered(template, _SENTINEL, system_prompt, jinja):
        raise IgnoresPrompt(r"a prompt template must have {prompt}, or be Jinja that shows the prompt's message")
    return _rendered(template, prompt, system_prompt, jinja)


def _rendered(template: str, prompt: str, system_prompt: str, jinja: Jinja) -> str:
    values = {"prompt": prompt, "system_prompt": system_prompt}
    if "{{" in template or "{%" in template:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": prompt})
        try:
            return jinja(messages, template, values)
        except (ChatTemplateError, InvalidParameterError) as error:
            raise BadTemplate(str(error)) from None
    made = []
    try:
        for text, field, form, conversion in string.Formatter().parse(template):
            made.append(text)
            if field is None:
                continue
            if field not in _FIELDS or form or conversion:
                raise BadTemplate(f"{{{field}}} is neither {{prompt}} nor {{system_prompt}}")
            made.append(values[field])
    except BadTemplate:
        raise
    except ValueError as error:
        raise BadTemplate(f"{error}; braces that are text stand in Jinja: {{{{ '{{' }}}}") from None
    return "".join(made)
