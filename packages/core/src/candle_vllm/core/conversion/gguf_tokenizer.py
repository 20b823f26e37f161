# SPDX-License-Identifier: MIT
"""Convert a tokenizer to GGUF metadata: from a `tokenizer.json` to `tokenizer.ggml.*`.

Byte-pair models have two forms in GGUF. Merges over GPT-2's byte alphabet are "gpt2", with the name of the
pre-tokenizer, which is found by splitting a text that distinguishes the pre-tokenizers. SentencePiece's byte-pair model
is "llama": instead of merges, the file has a score for each token, minus the rank of the merge that forms it. WordPiece
is "bert", and SentencePiece's unigram model "t5"; GGUF names neither the normaliser nor the pre-tokenizer of these two.
So all metadata is read again, and the tokenizer that it gives must tokenize texts like the original.
"""

from __future__ import annotations

import base64
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import ModelLoadError, UnsupportedModelError
from candle_vllm.core.text.gguf_backend import SPACE, byte_level_cuts
from candle_vllm.core.text.gguf_vocab import BYTE, CONTROL, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS
from candle_vllm.core.text.special_tokens import TEMPLATE_NAMES
from candle_vllm.core.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_UNREACHED = -1e6  # score of a token that no merge makes

PROBE = (
    "It's we'LL THEY'RE I'm can't 'Twas\n\n  two  spaces\t\ttabs\r\n 1 12 123 1234 12345 3.14 $5,000.00 x2y 2x Ca"
    "melCase HTMLParser snake_case foo/bar path\\to !!! ?! ... (a) [b] {c} <d> a+b=c #tag @you a_b\n \n  \n   end"
    "   \nna\xefve \xdcn\xefcode \xc9COLE stra\xdfe \u041f\u0440\u0438\u0432\u0435\u0442 \u0391\u0392\u0393 "
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663 \u0939\u093f\u0928\u094d\u0926"
    "\u0940 \u0e44\u0e17\u0e22 \u1780\u17b6\u1793\u17cb \u4f60\u597d\u4e16\u754c \u65e5\u672c\u8a9e\u30c6\u30b9"
    "\u30c8 \ud55c\uad6d \U0001f600\U0001f469\u200d\U0001f467 \u2705 e\u0301 \xbd \u2167 \xa0x\u3000wide a\u200bb"
    "  'S 'T we've'd  \n\t x"
)


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, ends: Sequence[int]) -> dict[str, Any]:
    """Return the keys of a tokenizer and, with a byte-pair model, of its chat templates.

    `rows` is the number of rows of the embedding table; ids without a token get a placeholder name. `ends` are the
    token ids that end a sequence. Raises UnsupportedModelError if GGUF cannot represent this tokenizer.
    """
    data = json.loads(tokenizer.backend.to_str())
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    if model["type"] in _PIECES:
        return _of_pieces(tokenizer, data, rows)
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"GGUF files are written with byte-pair, WordPiece and unigram tokenizers, and this is a {model['type']}"
        )
    if not model["merges"]:
        raise UnsupportedModelError("GGUF cannot express a byte-pair tokenizer without merges")
    tokens = _texts(model["vocab"], added, rows)
    spm, behind = bool(model.get("byte_fallback")), ""
    found: dict[str, Any] = {"model": "llama" if spm else "gpt2"}
    found["pre"] = "default" if spm else pre_tokenizer_name(tokenizer.backend, bool(model.get("ignore_merges")))
    types = [_type(index, text, model, added, spm) for index, text in enumerate(tokens)]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if spm:
        tokens = [text.replace(SPACE, " ") if kind == USER_DEFINED else text for text, kind in zip(tokens, types)]
        # GGUF puts a space before a text and behind each special token, or nowhere; "first" puts none behind those.
        if (scheme := _space_prefix(data)) == "first" and "bos_token" in _templates(tokenizer):
            behind = tokenizer.special_tokens.get("bos_token", "")
        if behind:
            logger.warning("GGUF cannot put a space before a text's first word alone: only chats have the right tokens")
        found |= {"scores": _scores(tokens, merges), "add_space_prefix": scheme != "never" and not behind}
    else:
        found["merges"] = [" ".join(merge) for merge in merges]
    found |= {"tokens": tokens, "token_type": types}
    found |= _special(tokenizer, tokens, ends)
    metadata = {PREFIX + key: value for key, value in found.items()}
    metadata = check_byte_pair(tokenizer, metadata, PROBE, bool(model.get("ignore_merges")), behind)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
        metadata["tokenizer.chat_templates"] = [name for name in template if name != "default"]
        template = template.get("default")
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}


def _of_pieces(tokenizer: Tokenizer, data: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return an encoder's vocabulary. The tokens around a text are found by position, whatever their names are."""
    added, vocabulary = {token["id"]: token for token in data["added_tokens"]}, data["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {text: index for index, (text, _) in enumerate(vocabulary)}
    texts = _texts(vocabulary, added, rows)
    before, behind = _around(tokenizer)
    found = _PIECES[data["model"]["type"]](data, texts)
    if behind:
        found |= {"eos_token_id": behind[-1], "seperator_token_id": behind[-1]}
    if before:
        found["cls_token_id"] = before[0]
    for key, name, usual in (("padding", "pad_token", "[PAD]"), ("mask", "mask_token", "[MASK]")):
        if (text := tokenizer.special_tokens.get(name, usual)) in texts:
            found[f"{key}_token_id"] = texts.index(text)
    found |= _frame(tokenizer, found)
    metadata = {PREFIX + key: value for key, value in found.items()}
    check_pieces(tokenizer, metadata, [PROBE, PROBE.lower(), *PROBE.split(" ")])
    return metadata


def _texts(vocabulary: Mapping[str, int], added: Mapping[int, Any], rows: int) -> list[str]:
    texts: list[str | None] = [None] * rows
    for text, index in vocabulary.items():
        texts[index] = text
    for index, token in added.items():
        texts[index] = token["content"]
    return [f"[PAD{index}]" if text is None else text for index, text in enumerate(texts)]


def _type(index: int, text: str, model: Mapping[str, Any], added: Mapping[int, Any], spm: bool) -> int:
    token = added.get(index)
    if spm and text == model.get("unk_token"):
        return UNKNOWN
    if token is not None and token["special"]:
        return CONTROL
    if token is not None and not (spm and SPACE in text and text in model["vocab"]):  # merges form the runs of spaces
        return USER_DEFINED
    if spm and len(text) == 6 and text.startswith("<0x"):
        return BYTE
    return NORMAL if model["vocab"].get(text) == index else UNUSED


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return a score for each token; the first merge has the highest score."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[text]) if text in ranks else _UNREACHED for text in tokens]


def _space_prefix(data: Mapping[str, Any]) -> str:
    """Return where the normaliser or the pre-tokenizer puts a space: "always", "first" or "never"."""
    for part in (data.get("normalizer"), data.get("pre_tokenizer")):
        for step in [] if part is None else part.get("normalizers") or part.get("pretokenizers") or [part]:
            if step["type"] in ("Prepend", "Metaspace"):
                return step.get("prepend_scheme", "always")
    return "never"


def _special(tokenizer: Tokenizer, tokens: Sequence[str], ends: Sequence[int]) -> dict[str, Any]:
    """Return the ids of special tokens, and which of them are added around a text."""
    ids = {text: index for index, text in enumerate(tokens)}
    named = {key: tokenizer.special_tokens.get(name) for key, name in TEMPLATE_NAMES.items()}
    found: dict[str, Any] = {f"{key}_token_id": ids[text] for key, text in named.items() if text in ids}
    ends = [index for index in dict.fromkeys((*ends, *tokenizer.eos_token_ids)) if index < len(tokens)]
    if ends:
        found.setdefault("eos_token_id", ends[0])
    _, behind = _around(tokenizer)
    if len(behind) == 1 and behind[0] in ends:  # as in llama.cpp's converter; Qwen3-Embedding
        found["eos_token_id"] = behind[0]
    others = [index for index in ends if index != found.get("eos_token_id")]
    found |= dict(zip(("eot_token_id", "eom_token_id"), others))
    if others[2:]:
        rest = ", ".join(tokens[index] for index in others[2:])
        logger.warning(
            "GGUF stores at most three tokens that end a text, and this model has more: %s are left out", rest
        )
    return found | _frame(tokenizer, found)


def _frame(tokenizer: Tokenizer, named: Mapping[str, int]) -> dict[str, Any]:
    """Return which tokens are added around a text; GGUF allows one token before it, and the end token after it.

    If there are several before it and the chat template writes them, all are left out, as in llama.cpp for GLM-4.
    """
    before, behind = _around(tokenizer)
    if len(before) > 1 and (start := "".join(map(tokenizer.token_text, before))) in _templates(tokenizer):
        logger.warning("GGUF cannot add %s before every text: only chats get it, from the chat template", start)
        before = []
    if len(before) > 1 or behind not in ([], [named.get("eos_token_id")]):
        raise UnsupportedModelError(
            f"this tokenizer puts the tokens {before} before and {behind} behind every text; GGUF has one token for "
            "the beginning and the end-of-sequence token for the end"
        )
    begin = {"bos_token_id": before[0]} if before else {}
    return begin | {"add_bos_token": bool(before), "add_eos_token": bool(behind)}


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that the tokenizer adds before and after a text."""
    inner, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    first = next((at for at in range(len(whole)) if whole[at : at + len(inner)] == inner), None)
    if first is None:
        raise UnsupportedModelError("this tokenizer changes a text to which it adds special tokens; GGUF cannot say so")
    return whole[:first], whole[first + len(inner) :]


def _templates(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template


def phi3_name(metadata: Mapping[str, Any]) -> str:
    """Return the model's name, with "Phi-3" if it has such role tokens: readers then strip white space behind them."""
    name, tokens = metadata["general.name"], metadata[f"{PREFIX}tokens"]
    roles = {"<unk>", "<s>", "<|endoftext|>", "<|user|>", "<|assistant|>"}
    return name if "phi-3" in name.lower() or not roles <= set(tokens) else f"Phi-3 {name}"


# ---- the pre-tokenizer -----------------------------------------------------------------------------------------------


def pre_tokenizer_name(backend: Backend, ignore_merges: bool) -> str:
    """Return the name in `PRE_TOKENIZERS` of a pre-tokenizer; raise UnsupportedModelError if no entry splits alike."""
    cut = backend.pre_tokenizer
    wanted = None if cut is None else _pieces(cut)
    alike = [
        name for name, entry in PRE_TOKENIZERS.items() if entry.byte_level and _pieces(byte_level_cuts(entry)) == wanted
    ]
    if not alike:
        raise UnsupportedModelError(
            "this byte-pair tokenizer splits texts into words like none of the pre-tokenizers that GGUF has names for; "
            "such a model can be served from its folder, with `isq` where that is wanted"
        )
    same = [name for name in alike if PRE_TOKENIZERS[name].ignore_merges == ignore_merges]
    return (same or alike)[0]


def _pieces(cut: Any) -> list[tuple[int, int]]:
    return [where for _, where in cut.pre_tokenize_str(PROBE)]


# ---- vocabularies of encoders ----------------------------------------------------------------------------------------


_INSIDE = "##"  # prefix of a token that does not begin a word
_PRE = f"{PREFIX}pre"
_OLDER = {"granite-embed-multi-97m": "gpt-4o"}  # a name that more readers know, if it gives the same tokens
_NEVER = -10000.0  # score of a row without a token


def wordpiece(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a WordPiece vocabulary, from a `tokenizer.json` and the text of every token id.

    In GGUF, the tokens that begin a word have a prefix, not the others.
    """
    model, kinds = data["model"], _kinds(data, texts, data["model"]["vocab"])
    named = (CONTROL, USER_DEFINED)
    normaliser = data.get("normalizer") or {}
    lowercase = bool(normaliser.get("lowercase", True))
    accents = normaliser.get("strip_accents")
    unknown = model["vocab"].get(model["unk_token"])
    if unknown is None:
        raise UnsupportedModelError(
            f"this WordPiece tokenizer's unk_token is {model['unk_token']!r:.80}, which its vocabulary lacks"
        )
    return {
        "model": "bert",
        "pre": "default",
        "tokens": [text if kind in named else _with_word_mark(text) for text, kind in zip(texts, kinds)],
        "token_type": kinds,
        "unknown_token_id": unknown,
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": lowercase if accents is None else bool(accents),
    }


def _with_word_mark(text: str) -> str:
    inside = text.startswith(_INSIDE) and text != _INSIDE
    return text.removeprefix(_INSIDE) if inside else SPACE + text


def unigram(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a unigram vocabulary; see `wordpiece` for the arguments."""
    pieces = data["model"]["vocab"]
    kinds = _kinds(data, texts, {text: index for index, (text, _) in enumerate(pieces)})
    unknown = data["model"].get("unk_id")
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    scores = [float(score) for _, score in pieces]
    found: dict[str, Any] = {
        "model": "t5",
        "pre": "default",
        "tokens": list(texts),
        "token_type": kinds,
        "scores": [*scores, *[_NEVER] * (len(texts) - len(scores))],
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
    }
    if unknown is not None:
        found["unknown_token_id"] = unknown
    if charsmap := _charsmap(data.get("normalizer")):
        found["precompiled_charsmap"] = charsmap
    return found


def _kinds(data: Mapping[str, Any], texts: Sequence[str], known: Mapping[str, int]) -> list[int]:
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in data["added_tokens"]}
    words = [NORMAL if known.get(text) == index else UNUSED for index, text in enumerate(texts)]
    return [added.get(index, kind) for index, kind in enumerate(words)]


def _charsmap(normaliser: Mapping[str, Any] | None) -> bytes:
    """Return SentencePiece's normalisation, if the tokenizer has it."""
    steps = [] if normaliser is None else normaliser.get("normalizers") or [normaliser]
    maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return base64.b64decode(maps[0]) if maps and maps[0] else b""


def check_pieces(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], texts: Sequence[str], *, framed: bool = True
) -> None:
    """Tokenize texts with the original tokenizer and with the one that its metadata gives, and compare.

    With `framed`, the special tokens around a text are compared too. Raises UnsupportedModelError if the tokens differ,
    or GGUF has no form for the tokenizer.
    """
    try:
        same = Tokenizer.from_gguf(metadata).encode_batch(texts, framed) == tokenizer.encode_batch(texts, framed)
    except ModelLoadError as error:
        raise UnsupportedModelError(f"GGUF cannot express this tokenizer: {error}") from error
    if not same:
        raise UnsupportedModelError(
            f"GGUF's {metadata[PREFIX + 'model']} tokenizer splits texts differently from this one: serve the model "
            "from its safetensors folder instead"
        )


def check_byte_pair(
    tokenizer: Tokenizer, metadata: dict[str, Any], probe: str, ignore_merges: bool, behind: str = ""
) -> dict[str, Any]:
    """Check and return a byte-pair tokenizer's metadata, with an older pre-tokenizer name if it gives the same tokens.

    A normaliser that composes characters (Qwen's) cannot be stored in GGUF and is left out. If the name implies another
    value of `ignore_merges` than the original's, the text of every token is tried, not only the probe. The special
    token `behind`, "" for none, is put before each text of the probe. Errors as `check_pieces`.
    """
    probe = unicodedata.normalize("NFC", probe)
    texts, pre = [behind + text for text in (probe, probe.lower(), *probe.split(" "))], metadata[_PRE]
    if (older := _OLDER.get(pre)) is not None:
        try:
            check_pieces(tokenizer, metadata | {_PRE: older}, [*texts, *_token_texts(tokenizer)], framed=False)
        except UnsupportedModelError:
            logger.warning("the file names the pre-tokenizer %s, which older programs do not know", pre)
        else:
            return metadata | {_PRE: older}
    elif metadata[f"{PREFIX}model"] == "gpt2" and PRE_TOKENIZERS[pre].ignore_merges != ignore_merges:
        texts += _token_texts(tokenizer)
    check_pieces(tokenizer, metadata, texts, framed=False)
    return metadata


def _token_texts(tokenizer: Tokenizer) -> list[str]:
    texts = tokenizer.backend.decode_batch([[index] for index in tokenizer.backend.get_vocab().values()])
    return [unicodedata.normalize("NFC", text) for text in texts]


_PIECES = {"WordPiece": wordpiece, "Unigram": unigram}
