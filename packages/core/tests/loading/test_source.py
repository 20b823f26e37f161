# SPDX-License-Identifier: MIT
"""Finding a model's files: paths, folders, and the hub (a fake one: nothing here reaches a network)."""

from __future__ import annotations

import fnmatch
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.conversion.gguf_file import write_file
from candle_vllm.core.errors import ConfigError, HubUnreachableError, ModelNotFoundError, UnsupportedModelError
from candle_vllm.core.loading.source import ModelFiles, choose_weights, gguf_models, model_files
from candle_vllm.core.progress import Progress, heard_by

SAFETENSORS = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
SPLIT = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


def resolve(model: str, **settings: Any) -> ModelFiles:
    return model_files(EngineConfig(model=model, **settings))


REAL_DOWNLOAD = huggingface_hub.snapshot_download


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this must not reach the network")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


# ---- names that are nearly right ----


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("SmolLM.Q4_1.gguf", "SmolLM2.Q4_1.gguf"), ("smolm2", "smollm2"), ("./zzz.gguf", None), ("none/x.gguf", None)],
)
def test_a_name_that_is_nearly_right_is_said(
    asked: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, ["SmolLM2.Q4_1.gguf", "smollm2/config.json", "SmolLM.Q4_1.txt"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(asked)
    assert (f"(did you mean {meant}?)" in str(caught.value)) == (meant is not None)


def test_a_cache_that_is_a_loop_of_links_has_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model: str, **options: Any) -> str:
        raise RuntimeError("Symlink loop")  # as `Path.resolve` of Python before 3.13

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match="is not in the cache"):
        resolve("Qwen/Qwen-4B", download_dir=tmp_path, offline=True)


def test_of_a_repository_that_is_not_there_the_caches_names_are_said(
    tmp_path: Path, hub: Callable[[list[str]], FakeHub]
) -> None:
    (tmp_path / "models--Qwen--Qwen3-4B").mkdir()
    fake = hub([])
    with pytest.raises(ModelNotFoundError, match=r"is not in the cache \(did you mean Qwen/Qwen3-4B\?\)"):
        resolve("Qwen/Qwen-4B", download_dir=tmp_path, offline=True)
    assert fake.calls[0][1]["local_files_only"]
    fake.listing_error = refusal(RepositoryNotFoundError, 404)
    with pytest.raises(ModelNotFoundError, match=r"Hugging Face has no model .* \(did you mean Qwen/Qwen3-4B\?\)"):
        resolve("Qwen/Qwen-4B", download_dir=tmp_path)


def test_the_demo_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("candle_vllm.core.config.DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFoundError, match="the demo model is not installed"):
        resolve("demo")
    fill(tmp_path, ["llm/SmolLM2-135M-Instruct.Q4_1.gguf"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("candle_vllm.core.config.DEMO_PACKAGE", "llm")
    assert resolve("demo").name == "SmolLM2-135M-Instruct.Q4_1"


def test_a_download_is_told_as_any_other_progress(tmp_path: Path, hub: Callable[[list[str]], FakeHub]) -> None:
    """As the hub does it: bars of its class, for received and written bytes, updated in its own threads."""
    fake = hub(["model.gguf"])

    def download(model: str, *, tqdm_class: Any, **options: Any) -> str:
        def work() -> None:
            received = tqdm_class(desc="Downloading bytes", total=0, unit="B", unit_scale=True)
            written = tqdm_class(desc="Reconstructing", total=0, unit="B", unit_scale=True)
            files = tqdm_class(desc="Fetching 1 files", total=1)
            for bar in (received, written):
                bar.total += 1000
                bar.refresh()
                bar.update(400)
                bar.refresh()
            files.update(1)
            for bar in (files, written, received):
                bar.close()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return fake.snapshot_download(model, **options)

    told: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch, heard_by(told.append):
        patch.setattr(huggingface_hub, "snapshot_download", download)
        resolve("org/name")
    assert {(each.what, each.total) for each in told} == {("downloading org/name", 1000)}
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert told[-1].done == 400


# ---- files and folders ----


def test_a_gguf_file_stands_alone(tmp_path: Path) -> None:
    fill(tmp_path, ["SmolLM2.Q4_1.gguf", "other.gguf", "config.json", "tokenizer.json"])
    files = resolve(str(tmp_path / "SmolLM2.Q4_1.gguf"))
    assert (files.name, files.format, files.folder) == ("SmolLM2.Q4_1", "gguf", tmp_path)
    assert files.weights == (tmp_path / "SmolLM2.Q4_1.gguf",)
    assert files.config is files.generation_config is files.tokenizer_folder is None


def test_a_gguf_file_without_the_ending(tmp_path: Path) -> None:
    """As Ollama stores them."""
    (tmp_path / "sha256-ab").write_bytes(b"GGUF\3\0\0\0")
    files = resolve(str(tmp_path / "sha256-ab"))
    assert (files.name, files.format, files.weights) == ("sha256-ab", "gguf", (tmp_path / "sha256-ab",))
    (tmp_path / "Modelfile").write_text("FROM ./sha256-ab\n")
    with pytest.raises(UnsupportedModelError, match="Modelfile is not a GGUF file"):
        resolve(str(tmp_path / "Modelfile"))


def test_any_part_of_a_split_file_is_the_model(tmp_path: Path) -> None:
    fill(tmp_path, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
    files = resolve(str(tmp_path / "m-00002-of-00002.gguf"))
    assert files.name == "m"
    assert [path.name for path in files.weights] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def test_a_folder_with_safetensors(tmp_path: Path) -> None:
    files = resolve(str(fill(tmp_path / "smol", [*SAFETENSORS, "also.gguf"])))
    folder = tmp_path / "smol"
    assert (files.name, files.format, files.folder) == ("smol", "safetensors", folder)
    assert files.weights == (folder / "model.safetensors",)
    assert files.config == folder / "config.json"
    assert files.generation_config == folder / "generation_config.json"
    assert files.tokenizer_folder == folder


def test_a_folder_with_one_gguf_model(tmp_path: Path) -> None:
    fill(tmp_path / "g", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m-f16.gguf", "imatrix.gguf"])
    files = resolve(str(tmp_path / "g"))
    assert (files.name, files.format, len(files.weights), files.tokenizer_folder) == ("g", "gguf", 2, None)


def gguf(path: Path, **metadata: str) -> Path:
    """A file with metadata alone; `type` and `architecture` are general keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(
        path, [], {"general.architecture": "llama"} | {f"general.{key}": value for key, value in metadata.items()}
    )
    return path


BESIDE = {
    "Tiny-Llama-imatrix.gguf": {"type": "imatrix"},
    "tiny-llama.imatrix.gguf": {"architecture": "imatrix"},
    "Tiny-Llama-importance.gguf": {"type": "imatrix"},
    "lora.gguf": {"type": "adapter"},
    "vision-f16.gguf": {"type": "mmproj", "architecture": "clip"},
    "projector.gguf": {"architecture": "clip"},
    "mtp-Tiny-Llama-Q4_K_M.gguf": {"type": "model"},
}


@pytest.mark.parametrize("beside", [*([name] for name in BESIDE), list(BESIDE)], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("name", ["Tiny-Llama-Q4_K_M.gguf", "Tiny-imatrix-mmproj.gguf"])
def test_what_lies_beside_a_model_is_told_by_its_contents(name: str, beside: list[str], tmp_path: Path) -> None:
    for other in beside:
        gguf(tmp_path / other, **BESIDE[other])
    model = gguf(tmp_path / name, type="model")
    assert resolve(str(tmp_path)).weights == (model,)
    for other in beside:  # by its name it is opened, and says itself what it is
        assert resolve(str(tmp_path), weight_file=other).weights == (tmp_path / other,)
    assert resolve(str(tmp_path), weight_file="*Tiny*").weights == (model,)


def test_a_folder_of_files_that_are_not_models(tmp_path: Path) -> None:
    gguf(tmp_path / "a.gguf", type="imatrix")
    with pytest.raises(ModelNotFoundError, match="importance matrices, adapters and vision towers are not models"):
        resolve(str(tmp_path))
    assert resolve(str(gguf(tmp_path / "other" / "mtp-a.gguf").parent)).name == "other"


def test_of_several_models_that_of_the_folders_name(tmp_path: Path) -> None:
    own = gguf(tmp_path / "tiny" / "tiny.gguf")
    gguf(tmp_path / "tiny" / "another.gguf")
    assert resolve(str(tmp_path / "tiny")).weights == (own,)
    own.unlink()
    gguf(tmp_path / "tiny" / "third.gguf")
    with pytest.raises(ModelNotFoundError, match=r"holds 2 GGUF models: another\.gguf, third\.gguf"):
        resolve(str(tmp_path / "tiny"))


def test_what_a_repositorys_listing_says_is_no_model() -> None:
    names = ["imatrix_unsloth.gguf", "m.imatrix.gguf", "M-iMatrix.gguf", "mmproj-F16.gguf", "mtp-m-Q8_0.gguf"]
    assert gguf_models(["m-Q8_0.gguf", "m-imatrix-Q4_0.gguf", *names]) == {
        name: (name,) for name in ("m-Q8_0.gguf", "m-imatrix-Q4_0.gguf")
    }


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, ["a.gguf", "org/name/b.gguf"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve("~/a.gguf").weights == (tmp_path / "a.gguf",)
    assert resolve("a.gguf").name == "a"
    assert resolve("org/name").weights == (Path("org/name/b.gguf"),)  # a folder that is there wins over an id
    assert resolve("./org/name").name == "name"


def test_several_models_are_listed_with_the_option_that_chooses(tmp_path: Path) -> None:
    fill(tmp_path, ["m.Q4_0.gguf", "m.Q8_0.gguf"])
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF models: m\.Q4_0\.gguf, m\.Q8_0\.gguf; .*weight_file \(--f\)"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), weight_file="m.Q8_0.gguf").weights == (tmp_path / "m.Q8_0.gguf",)
    assert resolve(str(tmp_path), weight_file="*Q4*").weights == (tmp_path / "m.Q4_0.gguf",)


@pytest.mark.parametrize("weight_file", [SPLIT[0], SPLIT[1], "*Q8_0*", "Q8_0/*"])
def test_a_weight_file_in_a_subfolder(tmp_path: Path, weight_file: str) -> None:
    fill(tmp_path, [*SPLIT, "Q4_0/m-Q4_0.gguf", *SAFETENSORS])
    files = resolve(str(tmp_path), weight_file=weight_file)
    assert files.format == "gguf"
    assert files.weights == tuple(tmp_path / name for name in SPLIT)


@pytest.mark.parametrize("weight_file", ["absent.gguf", "*Q2*", "../m.gguf", "/m.gguf", "Q4_0"])
def test_a_weight_file_that_is_not_there(tmp_path: Path, weight_file: str) -> None:
    fill(tmp_path, ["m.gguf", "in/m.gguf"])
    with pytest.raises(ModelNotFoundError, match="weight_file"):
        resolve(str(tmp_path / "in"), weight_file=weight_file)


def test_a_weight_file_beside_a_file(tmp_path: Path) -> None:
    fill(tmp_path, ["m.gguf"])
    with pytest.raises(ModelNotFoundError, match="leave out weight_file"):
        resolve(str(tmp_path / "m.gguf"), weight_file="n.gguf")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["config.json", "pytorch_model.bin"], UnsupportedModelError, "convert them to safetensors"),
        (["consolidated.00.pth"], UnsupportedModelError, "pickles"),
        (["model.safetensors"], ModelNotFoundError, "no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], ModelNotFoundError, "a LoRA adapter, not a model: name"),
        (["adapter_config.json", "adapter_model.bin"], ModelNotFoundError, "a LoRA adapter, not a model: name"),
        (["config.json", "model.safetensors.index.json"], ModelNotFoundError, r"but no \*\.safetensors file: add"),
        (["mmproj.gguf"], ModelNotFoundError, "neither config.json"),
        (["readme.md"], ModelNotFoundError, "neither config.json"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, names: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(str(fill(tmp_path, names)))


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.safetensors", "m.onnx"])
def test_files_of_other_formats(tmp_path: Path, name: str) -> None:
    fill(tmp_path, [name])
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    "model",
    [
        "  ", "a\0b", "a/b.", "/absent/model", "./absent", "../absent", "~/absent", "~nobody-of-this-name/x",
        "absent.gguf", "org/absent.gguf", "models\\absent", "C:\\m", "name", "a/b/c", "-a/b", "a/-b", "a--b/c",
        "a/b..c", "a/.b", "a/b.git", "org/näme", "org/na me", "x" * 5000, "o/" + "x" * 97, "https://host/org/name",
        "org/name\n",
    ],
)  # fmt: skip
def test_what_is_neither_there_nor_an_id_never_reaches_the_network(model: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(model)


def test_who_gives_a_short_name_of_the_command_line_is_told_where_its_id_stands() -> None:
    with pytest.raises(ModelNotFoundError, match=r"form organisation/name; `candle-vllm list --known` shows the ids"):
        resolve("qwen3:0.6b")


def test_a_path_that_vllm_takes_for_a_file_of_a_repository_is_told_its_name_here() -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"you are in; a file of the repository org/m-GGUF .* is org/m-GGUF:m\.gguf"
    ):
        resolve("org/m-GGUF/m.gguf")
    with pytest.raises(ModelNotFoundError, match=r"you are in$"):
        resolve("a/b/c/m.gguf")


def test_long_lists_are_cut_with_their_count() -> None:
    with pytest.raises(ModelNotFoundError, match="and 30 more"):
        choose_weights([f"m{i:02}.gguf" for i in range(50)], None, "here")


# ---- the hub ----


class FakeHub:
    """A hub with one repository, whose downloads land in a folder."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.listing_error: Exception | None = None
        self.download_error: Exception | None = None

    def model_info(self, model: str, **options: Any) -> Any:
        self.calls.append(("info", {"model": model, **options}))
        if self.listing_error is not None:
            raise self.listing_error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, model: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append(("download", {"model": model, "allow_patterns": allow_patterns, **options}))
        if options.get("local_files_only"):
            if not self.folder.is_dir():
                raise LocalEntryNotFoundError("not cached")
            return str(self.folder)
        if self.download_error is not None:
            raise self.download_error
        fill(self.folder, [n for n in self.names if any(fnmatch.fnmatch(n, p) for p in allow_patterns)])
        return str(self.folder)

    def downloaded(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], FakeHub]:
    def make(names: list[str]) -> FakeHub:
        fake = FakeHub(tmp_path / "snapshot", names)
        monkeypatch.setattr(huggingface_hub, "model_info", fake.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return make


def refusal(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))  # type: ignore[arg-type]


Hub = Callable[[list[str]], FakeHub]


def test_an_id_fetches_safetensors_and_what_lies_beside(hub: Hub, tmp_path: Path) -> None:
    templates = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    fake = hub([*SAFETENSORS, *templates, "README.md", "modeling.py", "pytorch_model.bin", "onnx/m.onnx",
                "original/model.safetensors", "onnx/config.json", "consolidated.safetensors"])  # fmt: skip
    files = resolve("org/name", revision="v1", hf_token="secret", download_dir=tmp_path / "cache")
    assert fake.downloaded() == sorted([*SAFETENSORS, *templates])
    assert (files.name, files.format, files.folder) == ("org/name", "safetensors", fake.folder)
    assert files.tokenizer_folder == fake.folder
    for _, call in fake.calls:
        assert (call["model"], call["revision"], call["token"]) == ("org/name", "v1", "secret")
    assert fake.calls[1][1]["cache_dir"] == tmp_path / "cache"


def test_parts_of_a_sentence_transformers_model_are_fetched(hub: Hub) -> None:
    parts = ["modules.json", "1_Pooling/config.json"]
    parts += ["2_Dense_1024/config.json", "2_Dense_1024/model.safetensors"]  # stella_en_400M_v5
    others = ["1_Pooling/notes.txt", "onnx/config.json", "3_x/y/config.json", "2_Dense_1024/pytorch_model.bin"]
    fake = hub([*SAFETENSORS, *parts, *others, "2_Transformer/model.safetensors"])
    resolve("org/name")
    assert fake.downloaded() == sorted([*SAFETENSORS, *parts])


@pytest.mark.parametrize(
    "shards",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-00001.safetensors", "mtp.safetensors"],
        ["layers-0.safetensors", "layers-1.safetensors", "mtp.safetensors", "outside.safetensors"],
    ],
    ids=lambda shards: shards[0],
)
def test_shards_of_any_name_are_fetched_with_their_index(shards: list[str], hub: Hub) -> None:
    others = ["consolidated.safetensors", "adapter_model.safetensors", "onnx/a.safetensors"]
    fake = hub(["config.json", "model.safetensors.index.json", *shards, *others])
    with pytest.raises(Exception, match="index"):  # the fake's files are empty of sense
        resolve("org/name")
    assert fake.downloaded() == sorted(["config.json", "model.safetensors.index.json", *shards])


def test_a_file_of_a_repository_by_its_name(hub: Hub) -> None:
    fake = hub(["m-Q4_0.gguf", "m-Q8_0.gguf"])
    assert resolve("org/name:m-Q8_0.gguf").weights == (fake.folder / "m-Q8_0.gguf",)


def test_a_dummy_has_no_tag(hub: Hub) -> None:
    fake = hub([*SAFETENSORS, "m-Q4_0.gguf"])
    with pytest.raises(ConfigError, match=r"load_format 'dummy' reads no weights, so 'org/name:Q4_0' cannot be used"):
        resolve("org/name:Q4_0", load_format="dummy")
    assert resolve("org/name:latest", load_format="dummy").folder == fake.folder


def test_one_gguf_of_a_repository(hub: Hub) -> None:
    fake = hub([*SPLIT, "m-Q4_0.gguf", "mmproj-f16.gguf", "config.json", "README.md"])
    files = resolve("org/name-GGUF", weight_file="*Q8_0*")
    assert fake.downloaded() == sorted([*SPLIT, "config.json"])
    assert files.weights == tuple(fake.folder / name for name in SPLIT)
    assert files.name == "org/name-GGUF"


def test_several_gguf_in_a_repository_are_listed_before_anything_is_fetched(hub: Hub) -> None:
    fake = hub([*SPLIT, "m-Q4_0.gguf"])
    with pytest.raises(ModelNotFoundError, match=r"org/name on Hugging Face holds 2 GGUF models: .*--f"):
        resolve("org/name")
    assert [kind for kind, _ in fake.calls] == ["info"]


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub: Hub) -> None:
    fake = hub(["config.json", "pytorch_model.bin"])
    with pytest.raises(UnsupportedModelError, match="convert them to safetensors"):
        resolve("org/name")
    assert [kind for kind, _ in fake.calls] == ["info"]


def test_names_with_pattern_signs_are_fetched_literally(hub: Hub) -> None:
    fake = hub(["m[1]-Q4.gguf", "m1-Q8.gguf"])
    resolve("org/name", weight_file="m[1]-Q4.gguf")
    assert fake.downloaded() == ["m[1]-Q4.gguf"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(GatedRepoError, 403), "is gated: accept its terms"),
        (refusal(RepositoryNotFoundError, 404), "check the spelling"),
        (refusal(RevisionNotFoundError, 404), "no revision 'v9'"),
        (refusal(HfHubHTTPError, 401), "pass a valid token"),
        (refusal(HfHubHTTPError, 400), "answered 400"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(hub: Hub, error: Exception, message: str) -> None:
    fake = hub(SAFETENSORS)
    fake.listing_error = error
    with pytest.raises(ModelNotFoundError, match=message) as raised:
        resolve("org/name", revision="v9", hf_token="secret")
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [HTTPError("no route"), OfflineModeIsEnabled("off"), refusal(HfHubHTTPError, 503)], ids=lambda e: type(e)
)
def test_without_an_answer_the_cache_is_used(hub: Hub, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    fake = hub(SAFETENSORS)
    fake.listing_error = error
    with pytest.raises(HubUnreachableError, match="not in the cache and Hugging Face was not reached"):
        resolve("org/name")
    fill(fake.folder, SAFETENSORS)
    with caplog.at_level(logging.WARNING):
        assert resolve("org/name").folder == fake.folder
    assert "cannot be reached" in caplog.text


@pytest.mark.parametrize("is_set", [False, True])
def test_the_variable_is_named_where_it_is_set(is_set: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(SAFETENSORS).listing_error = OfflineModeIsEnabled("off") if is_set else HTTPError("no route")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_set)
    way = "connect to the network, without HF_HUB_OFFLINE, or" if is_set else "connect to the network or"
    with pytest.raises(ModelNotFoundError, match=f"{way} pass a folder"):
        resolve("org/name")


def test_offline_asks_the_cache_alone(hub: Hub) -> None:
    fake = hub(SAFETENSORS)
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        resolve("org/name", offline=True)
    fill(fake.folder, [*SPLIT, "m-Q4_0.gguf"])
    files = resolve("org/name", weight_file="*Q8_0*", offline=True)
    assert files.weights == tuple(fake.folder / name for name in SPLIT)
    assert all(kind == "download" and call["local_files_only"] for kind, call in fake.calls)


@pytest.mark.parametrize(
    "error", [HTTPError("reset"), OSError(28, "No space left on device"), PermissionError(13), RuntimeError("transfer")]
)
def test_a_download_that_breaks_off(hub: Hub, error: Exception) -> None:
    fake = hub(SAFETENSORS)
    fake.download_error = error
    with pytest.raises(ModelNotFoundError, match=r"did not finish.* has space and can be written; offline uses"):
        resolve("org/name")


def test_access_that_ends_with_the_listing(hub: Hub) -> None:
    fake = hub(SAFETENSORS)
    fake.download_error = refusal(GatedRepoError, 403)
    with pytest.raises(ModelNotFoundError, match="gated"):
        resolve("org/name")


def test_a_folder_that_takes_the_demo_models_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("demo")
    assert f"{tmp_path / 'demo'} was used, because it has the demo model's name" in str(caught.value)


def test_who_did_not_ask_to_be_offline_is_not_told_to_stop(hub: Hub) -> None:
    hub(SAFETENSORS).listing_error = HTTPError("no route")
    for offline, said, not_said in ((True, "leave out offline", "connect"), (False, "connect to", "leave out")):
        with pytest.raises(ModelNotFoundError) as caught:
            resolve("org/name", offline=offline)
        assert said in str(caught.value)
        assert not_said not in str(caught.value)
