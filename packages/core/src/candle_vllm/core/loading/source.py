# SPDX-License-Identifier: MIT
"""Find a model's files: resolve a path, a folder or a Hugging Face id to weights, configuration and tokenizer files.

Loading a model begins here. An existing path is never looked up on the hub; only weights, JSON, templates and tokenizer
files are downloaded, never code or pickles.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from candle_vllm.core.config import DEMO, EngineConfig, demo_command, demo_model, is_demo
from candle_vllm.core.errors import (
    ConfigError,
    HubUnreachableError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from candle_vllm.core.loading.gguf import MAGIC, file_kind, split_names
from candle_vllm.core.loading.safetensors import INDEX_FILE, SINGLE_FILE, safetensors_files
from candle_vllm.core.progress import Progress, teller
from candle_vllm.core.setting_kinds import nearest

logger = logging.getLogger(__name__)

_ID_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_ID_PART}/{_ID_PART}", re.ASCII)
COMPANION_PATTERNS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
"""Files of a repository's top folder that are downloaded with the weights."""
TEMPLATES = "additional_chat_templates/*.jinja"
_OTHER_WEIGHTS = ("consolidated", "adapter_model")  # safetensors in Mistral's own format, and of an adapter
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HUB_TIMEOUT_S = 10.0
_SAMPLES, _SAMPLE = 256, 1 << 12  # samples of a weight file that are hashed, and bytes of each
TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
"""Valid text after the colon of `organisation/name:Q4_K_M`."""
USUAL = "Q4_K_M"
"""The type that is chosen in a repository with several GGUF models, if the name has no tag."""
_PART = re.compile(r"[0-9]{1,3}_(?:\w{1,40}/config\.json|Dense\w{0,40}/model\.safetensors)", re.ASCII)
_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q[0-9][0-9A-Z_]*|TQ[0-9]_[0-9]|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32))$", re.I
)
_LONGEST_QUANT = 64  # number of last characters of a name that are searched for a quantisation type
_LOOKED_AT = 10_000  # maximum number of names of a folder that are read
LISTED = 20
"""Maximum number of file names in a message."""


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a model.

    Attributes:
        name: default name under which the model is served: its id, its folder's name or its file's stem.
        weights: the weight files; all parts or shards, in order. Empty for a dummy.
        config, generation_config: `config.json` and `generation_config.json` of the folder, if they exist; None for a
            GGUF file that was named by its path. `config` exists for safetensors and dummies.
        tokenizer_folder: the folder, if it holds a tokenizer; None for a GGUF file that was named by its path.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    format: Literal["gguf", "safetensors", "dummy"]
    config: Path | None = None
    generation_config: Path | None = None
    tokenizer_folder: Path | None = None


def model_files(config: EngineConfig) -> ModelFiles:
    """Find the files of `config.model`, and download them if necessary.

    The model is "demo", the demo model; a `.gguf` file; a folder with `config.json` and safetensors, or with one GGUF
    model; otherwise a Hugging Face id, `organisation/name`, or for a GGUF file `organisation/name:Q4_K_M` or
    `organisation/name:FILE.gguf`. `weight_file` is a GGUF file in a folder or repository: a path, a pattern such as
    `*Q4_K_M*`, or a quantisation type. With `load_format` "dummy", only config.json and a tokenizer are needed.

    Raises:
        ConfigError: "dummy" with a GGUF file or with `weight_file`.
        ModelNotFoundError: the model does not exist or cannot be downloaded; the message says what to do.
        UnsupportedModelError: the weights are in an unsupported format, such as pickles.
        InvalidFileError: the index of a sharded checkpoint is damaged.
    """
    model, weight_file = config.model, config.weight_file
    if not model.strip() or "\0" in model:
        raise ModelNotFoundError(
            "no model is given: pass a .gguf file, a folder, or a Hugging Face id (organisation/name)"
        )
    path, dummy = _existing(model), config.load_format == "dummy"
    tagged = path is None and model.partition(":")[2] not in ("", "latest")
    if dummy and (weight_file is not None or model.endswith(".gguf") or tagged):
        raise ConfigError(
            f"load_format 'dummy' reads no weights, so {weight_file or model!r:.200} cannot be used with it: pass a "
            "folder or a Hugging Face id with config.json and a tokenizer, or leave load_format out",
            "load_format",
        )
    if path is not None and model == DEMO:
        try:
            return _from_path(path, weight_file, dummy=dummy)
        except (ModelNotFoundError, UnsupportedModelError) as error:
            raise type(error)(
                f"{error}; {path.resolve()} was used, because it has the demo model's name: rename it, or start in "
                "another folder"
            ) from error
    if path is None and is_demo(model):
        path = demo_model()
        if path is None:
            raise ModelNotFoundError(
                f"the demo model is not installed: `{demo_command()}` installs it; or pass a .gguf file, a folder, or "
                "a Hugging Face id (organisation/name)"
            )
    if path is not None:
        return _from_path(path, weight_file, dummy=dummy)
    if model.startswith(("/", "./", "../", "~")) or "\\" in model or (model.endswith(".gguf") and ":" not in model):
        repo, _, file = model.rpartition("/")
        hub = f"; a file of the repository {repo} on Hugging Face is {repo}:{file}" if HUB_ID.fullmatch(repo) else ""
        raise ModelNotFoundError(
            f"there is no file or folder {model!r}{_beside(model)}; check the path, and the folder you are in{hub}"
        )
    repo, _, tag = model.partition(":")
    if not HUB_ID.fullmatch(repo) or (tag and not TAG.fullmatch(tag)):
        raise ModelNotFoundError(
            f"{model!r:.200} is neither a file or folder here nor a Hugging Face id of the form organisation/name"
            f"{_beside(model)}; `candle-vllm list --known` shows the ids of the command line's short names"
        )
    model, weight_file = repo, weight_file or (None if tag in ("", "latest") else tag)
    if config.offline:
        folder = _cached(config, model, "leave out offline (--offline)")
    else:
        folder = _download(config, model, weight_file)
    return _without_weights(folder, model) if dummy else _from_folder(folder, model, weight_file, subfolders=True)


def _from_path(path: Path, weight_file: str | None, *, dummy: bool) -> ModelFiles:
    name = path.resolve().name
    if dummy:
        return _without_weights(path, name)
    return _from_folder(path, name, weight_file) if path.is_dir() else _from_file(path, weight_file)


def _existing(model: str) -> Path | None:
    try:
        path = Path(os.path.expanduser(model))
        return path if path.exists() else None
    except OSError as error:  # a path that is too long, an unreadable folder
        raise ModelNotFoundError(f"{model!r:.200} cannot be looked up: {error}") from error


def _beside(model: str) -> str:
    """Return ` (did you mean X?)` with the model of the most similar name in the same folder, or ""."""
    path = Path(os.path.expanduser(model))
    with suppress(OSError):
        found = itertools.islice(path.parent.iterdir(), _LOOKED_AT)
        names = {each.name: each for each in found if each.suffix == ".gguf" or (each / "config.json").is_file()}
        if near := difflib.get_close_matches(path.name, names, n=1):
            return f" (did you mean {path.with_name(near[0])}?)"
    return ""


def _in_cache(model: str, cache_dir: Path | None) -> str:
    """Return the same hint as `_beside`, with the most similar repository in the hub's cache, or ""."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        found = itertools.islice(Path(cache_dir or HF_HUB_CACHE).glob("models--*"), _LOOKED_AT)
        return nearest(model, [each.name.removeprefix("models--").replace("--", "/") for each in found])
    return ""


def _from_file(path: Path, weight_file: str | None) -> ModelFiles:
    if path.suffix in PICKLES:
        raise _pickle_error(str(path))
    if path.suffix != ".gguf" and not _has_gguf(path):  # Ollama's files have no ending
        raise UnsupportedModelError(
            f"{path} is not a GGUF file; for safetensors pass the folder that also holds config.json"
        )
    if weight_file is not None:
        raise ModelNotFoundError(f"{path} is itself a file: leave out weight_file ({weight_file!r})")
    names = split_names(path.name)
    stem = path.stem if len(names) == 1 else names[0].removesuffix(f"-00001-of-{len(names):05d}.gguf")
    return ModelFiles(name=stem, folder=path.parent, weights=tuple(path.with_name(n) for n in names), format="gguf")


def _has_gguf(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def _from_folder(folder: Path, name: str, weight_file: str | None, *, subfolders: bool = False) -> ModelFiles:
    """Find the files in a folder; with `subfolders`, search these too, and choose `USUAL` among several models."""
    deep = subfolders or weight_file is not None
    files = (path for path in folder.glob("**/*" if deep else "*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    chosen = choose_weights(names, weight_file, str(folder), folder, usual=subfolders)
    if chosen:
        weights, format = tuple(folder / part for part in chosen), "gguf"
    else:
        weights, format = safetensors_files(folder), "safetensors"
    return _files(folder, name, weights, format)


def _without_weights(folder: Path, name: str) -> ModelFiles:
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder with a config.json"
        raise ModelNotFoundError(f"{folder} {what}, from which load_format 'dummy' makes the weights")
    return _files(folder, name, (), "dummy")


def _files(
    folder: Path, name: str, weights: tuple[Path, ...], format: Literal["gguf", "safetensors", "dummy"]
) -> ModelFiles:
    config, generation = folder / "config.json", folder / "generation_config.json"
    return ModelFiles(
        name=name,
        folder=folder,
        weights=weights,
        format=format,
        config=config if config.is_file() else None,
        generation_config=generation if generation.is_file() else None,
        tokenizer_folder=folder if any((folder / file).is_file() for file in TOKENIZER_FILES) else None,
    )


def choose_weights(
    names: Sequence[str], weight_file: str | None, where: str, folder: Path | None = None, *, usual: bool = False
) -> tuple[str, ...]:
    """Choose the weights among a folder's files: the parts of one GGUF model, or () for its safetensors.

    Args:
        names: paths inside the folder or repository `where`, with forward slashes.
        weight_file: as for `model_files`, whose errors are raised.
        folder: folder of the files; None if only their names are known.
        usual: choose the model of type `USUAL` among several.
    """
    top = [name for name in names if "/" not in name]
    if weight_file is None and "config.json" in top and any(name.endswith(".safetensors") for name in top):
        return ()
    if weight_file is not None and weight_file in names and weight_file.endswith(".gguf"):
        return _parts(PurePosixPath(weight_file))
    models = gguf_models(names, folder)
    if weight_file is not None:
        models = _matching(models, weight_file, where)
    elif usual and len(models) > 1 and len(found := of_tag(models, USUAL)) == 1:
        models = {first: models[first] for first in found}
    elif folder is not None and (own := f"{folder.resolve().name}.gguf") in models:  # llama.cpp's convention
        return models[own]
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        raise ModelNotFoundError(
            f"{where} holds {len(models)} GGUF models: {_listed(models)}; name one with weight_file (--f)"
        )
    if "adapter_config.json" in top:
        raise ModelNotFoundError(
            f"{where} is a LoRA adapter, not a model: name its base model here, and serve the adapter beside it "
            "(docs/lora.md), or merge both with `candle-vllm quantize --lora`"
        )
    if any(name.endswith(".safetensors") for name in top):
        raise ModelNotFoundError(f"{where} holds safetensors files but no config.json, which describes the model")
    if any(name.endswith(PICKLES) for name in top):
        raise _pickle_error(where)
    if INDEX_FILE in top:
        raise ModelNotFoundError(f"{where} holds {INDEX_FILE} but no *.safetensors file: add the shards that it names")
    raise ModelNotFoundError(
        f"{where} holds neither config.json with *.safetensors nor a GGUF model; importance matrices, adapters and "
        "vision towers are not models"
    )


def gguf_models(names: Iterable[str], folder: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Map the first part of every GGUF model to all its parts; draft models are left out if there are others.

    With `folder`, vision projectors, importance matrices and adapters are left out by their metadata; without it (a
    repository's listing), projectors and importance matrices by their names.
    """
    models: dict[str, tuple[str, ...]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix == ".gguf" and _is_model(path, folder):
            parts = _parts(path)
            models[parts[0]] = parts
    # A draft model's file (multi-token prediction) has no key that distinguishes it from its target model.
    return {
        first: parts for first, parts in models.items() if not PurePosixPath(first).name.startswith("mtp-")
    } or models


def _parts(path: PurePosixPath) -> tuple[str, ...]:
    return tuple(path.with_name(part).as_posix() for part in split_names(path.name))


def _is_model(name: PurePosixPath, folder: Path | None) -> bool:
    with suppress(ModelLoadError, ModelNotFoundError):  # the kind of an unreadable file is derived from its name
        if folder is not None:
            return file_kind(folder / name) == "model"
    return re.search(r"mmproj|^imatrix|imatrix\.gguf$", name.name.lower()) is None


def _matching(models: dict[str, tuple[str, ...]], weight_file: str, where: str) -> dict[str, tuple[str, ...]]:
    if not weight_file.endswith(".gguf") and not re.search(r"[*?\[]", weight_file):
        if of_type := of_tag(models, weight_file):
            return {first: models[first] for first in of_type}
        raise ModelNotFoundError(
            f"{where} has no GGUF model {weight_file!r:.200}, which is neither the name of a .gguf file nor a pattern "
            f"such as *Q4_K_M*; its types are {_listed(map(tag_of, models)) or 'none'}"
        )
    found = {
        first: parts
        for first, parts in models.items()
        if any(fnmatch.fnmatchcase(name, weight_file) for part in parts for name in (part, PurePosixPath(part).name))
    }
    if not found:
        raise ModelNotFoundError(
            f"weight_file {weight_file!r:.200} matches no GGUF model in {where}; it holds {_listed(models) or 'none'}"
        )
    return found


def tag_of(weight_file: str) -> str:
    """Return the tag of a GGUF file in its repository: the type at the end of its name, otherwise the name."""
    stem = re.sub(r"-00001-of-[0-9]{5}$", "", PurePosixPath(weight_file).name.removesuffix(".gguf"))
    match = _QUANT.search(stem, max(0, len(stem) - _LONGEST_QUANT))
    return match[1] if match else stem


def of_tag(models: Iterable[str], tag: str) -> list[str]:
    """Return the GGUF models of a tag: by type or name, ignoring case; otherwise by a part of the name."""
    wanted, models = tag.lower(), list(models)
    names = {first: PurePosixPath(first).name.lower() for first in models}
    exact = [first for first in models if wanted in (tag_of(first).lower(), names[first])]
    return exact or [first for first in models if wanted in names[first]]


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _pickle_error(where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} holds the weights as pickles, which can run any code when read; convert them to safetensors, or use "
        "a repository that has them"
    )


def _download(config: EngineConfig, model: str, weight_file: str | None) -> Path:
    import huggingface_hub  # its import takes half a second, and most models are local files
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    names = _listing(config, model)
    if names is None:
        without = "connect to the network, without HF_HUB_OFFLINE," if constants.HF_HUB_OFFLINE else None
        return _cached(config, model, without)
    if config.load_format != "dummy":
        wanted = wanted_files(names, choose_weights(names, weight_file, f"{model} on Hugging Face", usual=True))
    else:
        wanted = list(map(glob.escape, _companions(names)))
    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=config.revision,
            token=config.hf_token,
            cache_dir=config.download_dir,
            allow_patterns=wanted,
            tqdm_class=_told_bar(f"downloading {model}"),
        )
    except (HTTPError, OSError, RuntimeError) as error:  # the hub's transfer library raises RuntimeError
        raise hub_refusal(model, config.revision, error, config.download_dir) or HubUnreachableError(
            f"the download of {model} did not finish: {error}; run it again to resume it, and check the network, and "
            "that the cache (cache_dir) has space and can be written; offline uses what is in it"
        ) from error
    return Path(folder)


def _told_bar(what: str) -> type[Any]:
    """Make a class of invisible progress bars for the hub, which report bytes to `progress`.

    The hub's library has one bar for bytes received, one for bytes written, and updates them in its own threads.
    """
    import io

    import tqdm

    told, furthest = teller(), 0
    shown: Any = tqdm.tqdm

    class ToldBar(shown):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False, "mininterval": 0.2})

        def display(self, *_: Any, **__: Any) -> bool:
            nonlocal furthest
            if self.unit == "B" and self.total:
                furthest = max(furthest, min(int(self.n), int(self.total)))
                told(Progress(what, furthest, int(self.total)))
            return True

    return ToldBar


def _listing(config: EngineConfig, model: str) -> list[str] | None:
    """List the repository's files; None if the hub cannot be reached, or answers with status 429 or from 500 on."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        info = huggingface_hub.model_info(model, revision=config.revision, token=config.hf_token, timeout=HUB_TIMEOUT_S)
    except (HTTPError, OfflineModeIsEnabled) as error:
        refusal = hub_refusal(model, config.revision, error, config.download_dir)
        if refusal is not None:
            raise refusal from error
        logger.warning("Hugging Face cannot be reached (%s); looking for %s in the cache", error, model)
        return None
    return sorted(sibling.rfilename for sibling in info.siblings or ())


def wanted_files(names: Sequence[str], gguf_parts: Sequence[str]) -> list[str]:
    """Return patterns that match the files to download: the weights, and those of `_companions`."""
    top = [name for name in names if "/" not in name]
    if gguf_parts:
        weights = list(gguf_parts)
    elif SINGLE_FILE in top:
        weights = [SINGLE_FILE]
    else:  # shards may have any names
        weights = [name for name in top if name.endswith(".safetensors")]
        weights = [name for name in weights if not name.startswith(_OTHER_WEIGHTS)] or weights
    return list(map(glob.escape, _companions(names) + weights))


def _companions(names: Sequence[str]) -> list[str]:
    """Return the files to download besides the weights, also named templates and sentence-transformers' parts."""
    top = [name for name in names if "/" not in name]
    parts = [name for name in names if _PART.fullmatch(name)] if "modules.json" in top else []
    parts += [name for name in names if fnmatch.fnmatchcase(name, TEMPLATES)]
    return [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS)] + parts


def hub_refusal(model: str, revision: str | None, error: Exception, cache: Path | None) -> ModelNotFoundError | None:
    """Return the error for the hub's answer; None without an answer, or for status 429 or 500 and above."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return ModelNotFoundError(
            f"{model} is gated: accept its terms on Hugging Face, then pass a token (or run `hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"Hugging Face has no model {model!r}{_in_cache(model, cache)}, or it is private: check the spelling, pass "
            "a token for a private one, or pass a folder"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(f"{model} has no revision {revision!r}: check the branch, tag or commit")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return ModelNotFoundError(f"Hugging Face refuses access to {model} (status {status}): pass a valid token")
        if status < 500 and status != 429:
            return ModelNotFoundError(f"Hugging Face answered {status} when asked for {model}: {error}")
    return None


def _cached(config: EngineConfig, model: str, allow: str | None) -> Path:
    """Return the folder of earlier downloads; `allow` says how to allow the network, None if no setting forbids it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No file is required: the cache has the files that were downloaded, perhaps by another program.
        folder = huggingface_hub.snapshot_download(
            model, revision=config.revision, cache_dir=config.download_dir, allow_patterns=[], local_files_only=True
        )
    except (LocalEntryNotFoundError, OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        revision, near = config.revision or "main", _in_cache(model, config.download_dir)
        raise (HubUnreachableError if allow is None else ModelNotFoundError)(
            f"{model} (revision {revision}) is not in the cache{near} and Hugging Face was not reached: "
            f"{allow or 'connect to the network'} or pass a folder or .gguf file"
        ) from error
    return Path(folder)


def files_mark(paths: Iterable[Path], *, times: bool = True) -> str:
    """Return a SHA-256 of each file's size, modification time (if `times`) and samples, instead of all its bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            digest.update(f"{info.st_size} {info.st_mtime_ns if times else 0} ".encode())
            for number in range(_SAMPLES):
                file.seek(max(0, info.st_size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
