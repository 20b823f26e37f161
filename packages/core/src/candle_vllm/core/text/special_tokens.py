# SPDX-License-Identifier: MIT
"""Find the tokens that end a turn or a file, list control tokens that stay in the text, and ChatML (steps 3 and 9).

Files name one end-of-sequence token; chat models also stop at others. The lists and exceptions follow llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping

# Tokens that end a turn in every vocabulary that has them; `end_of_turn_ids` has the exceptions.
END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip

# A special token's name in GGUF files, and its name in templates.
TEMPLATE_NAMES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}

# Fill-in-the-middle tokens that pad, or after which another repository or file begins; keys are those of GGUF files.
END_OF_FILE = (
    ("fim_pad", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep", ("<|file_sep|>",)),
)

# Parts of gpt-oss's message frame: the parser of the text needs them, so they are not hidden.
VISIBLE_FRAME = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# The chat template of `--chat-template chatml`, and of models whose files lack a template, as the first Qwen's.
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def end_of_turn_ids(ids: Mapping[str, int]) -> set[int]:
    """Return the ids among `ids` (token text -> id) that end a turn."""
    found = {text for text in END_OF_TURN if text in ids}
    # If a frame has its own end-of-turn token, <|end|> only closes one of several messages.
    harmony = {"<|return|>", "<|call|>"} <= found
    solar = "<|flush|>" in found and bool(found & {"<|call|>", "<|calls|>"})
    if harmony or solar:
        found.discard("<|end|>")
    # Gemma 4 has </s> as the HTML tag, PLaMo has it as plain text.
    if "<|tool_response>" in found or "<|plamo:eos|>" in ids:
        found.discard("</s>")
    return {ids[text] for text in found}


def end_of_file_ids(ids: Mapping[str, int], given: Mapping[str, int]) -> set[int]:
    """Return ids of padding, repository and file separators: from `given`, a file's ids, otherwise by text."""
    found = set()
    for name, texts in END_OF_FILE:
        index = given.get(name, next((ids[text] for text in texts if text in ids), None))
        if index is not None:
            found.add(index)
    return found
