"""What people bring from candle-vllm, the original: its command lines work, or say what has no effect here."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_vllm.server.cli import configure_logging, say
from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.configuration import Configuration, load_configuration
from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.options import UsageError

Load = Callable[..., Configuration]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The configuration of a command line in an empty folder, or one with the files that are given."""
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    home.mkdir()

    def load(line: str = "", env: dict[str, str] | None = None, command: str = "serve", **files: str) -> Configuration:
        for name, text in files.items():
            (folder / {"env": ".env"}.get(name, f"{name}.yaml")).write_text(text)
        given, _ = parse(command, line.split())
        return load_configuration(given, env or {}, folder=folder, home=home)

    return load


# ---- command lines ---------------------------------------------------------------------------------------------------


def test_of_several_devices_the_first_is_used_and_a_remark_says_so(load: Load, tmp_path: Path) -> None:
    made = load(f"--d 0,1 --w {tmp_path} --isq q4k --ui-server")
    assert engine_config(made.settings).device == "cuda:0"
    assert [remark for remark in made.remarks if "cuda:0 is used, and cuda:1 is not" in remark]
    assert load("--d 2 --m x").remarks == ()


@pytest.mark.parametrize("devices", ["0,", "cpu,0", "0,cpu", ",", "0,1000"])
def test_lists_of_devices_that_are_none(load: Load, devices: str) -> None:
    with pytest.raises(UsageError, match="must be one device"):
        load(f"--d {devices}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--log --p 2000", "--log-file candle-vllm.log --port 2000"),
        ("--dtype fp16", "--dtype f16"),
        ("--dtype half", "--dtype f16"),
        ("--dtype fp32", "--dtype f32"),
        ("--dtype bfloat16", "--dtype bf16"),
        ("--kvcache-dtype e4m3", "--kv-cache-dtype fp8"),
        ("--kvcache-dtype bf16", "--kv-cache-dtype auto"),
        ("--mcp-command python --mcp-args -m,server", "--mcp-command python --mcp-args=-m,server"),
        ("--h socket:///run/x.sock", "--h unix:///run/x.sock"),
        ("--h file:///run/x.sock", "--h unix:///run/x.sock"),
    ],
)
def test_their_spellings_mean_what_ours_mean(load: Load, theirs: str, ours: str) -> None:
    theirs_made, ours_made = load(theirs).settings, load(ours).settings
    assert theirs_made.address == ours_made.address
    assert engine_config(theirs_made) == engine_config(ours_made)
    assert (theirs_made.log_file, theirs_made.mcp_args) == (ours_made.log_file, ours_made.mcp_args)
    assert load(theirs).remarks == ()


def test_prompts_that_are_not_cut(load: Load) -> None:
    assert engine_config(load("--prefill-chunk-size 0").settings).max_num_batched_tokens == 0


@pytest.mark.parametrize("name", ["turbo8", "turbo4", "turbo3", "k8v4", "4bit", "k3v4"])
def test_a_compressed_cache_is_refused_with_what_there_is(load: Load, name: str) -> None:
    with pytest.raises(UsageError, match=r"must be one of auto, fp8: the cache has 16 bits a number, or 8 on a GPU"):
        load(f"--kvcache-dtype {name}")


def test_flags_that_set_nothing_are_taken_with_a_remark(load: Load) -> None:
    line = "--holding-time 100 --verbose --multithread --kvcache-mem-cpu=512 --prompt-cache-backend sled --m x"
    made = load(line)
    assert made.settings.model == "x"
    assert [remark.split()[0] for remark in made.remarks] == [
        "--holding-time", "--verbose", "--multithread", "--kvcache-mem-cpu", "--prompt-cache-backend",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--holding-time: expected one argument"):
        load("--holding-time")


def test_the_log_goes_to_a_file_as_well_that_others_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, root = tmp_path / "candle-vllm.log", logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        for _ in range(2):
            configure_logging("info", file=file)
            say(("one thing has no effect",))
        for handler in root.handlers:
            handler.close()
    finally:
        root.setLevel(level)
    assert file.read_text().count("one thing has no effect") == 2
    assert "one thing has no effect" in capsys.readouterr().err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
