# SPDX-License-Identifier: MIT
"""The table of settings is complete, and .example.env and example.models.yaml have what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from candle_vllm.core import SamplingParams
from candle_vllm.core.config import SETTINGS
from candle_vllm.core.setting_kinds import Integer, Number
from candle_vllm.responses.store.backend import URLS
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.configuration import load_settings
from candle_vllm.server.settings.models_file import read_models_file
from candle_vllm.server.settings.options import SAMPLING
from candle_vllm.server.settings.sources import SettingsSource, read_dotenv
from candle_vllm.server.settings.table import OPTIONS

ROOT = Path(__file__).parents[4]


def test_every_setting_of_the_engine_is_reached_from_the_server() -> None:
    """What is not handed on as it is, `engine_config` makes itself."""
    handed_on = [option.engine for option in OPTIONS if option.engine is not None]
    assert {*handed_on, "model", "weight_file", "chat_template"} == set(SETTINGS)
    assert len(handed_on) == len(set(handed_on)) == len(SETTINGS) - 3


def test_flags_are_unique() -> None:
    flags = [flag for option in OPTIONS for flag in (*option.flags, *option.constants)]
    assert len(flags) == len(set(flags))


def test_mailbox_page_names_the_urls_of_stores() -> None:
    text = (ROOT / "docs" / "mailbox.md").read_text()
    assert [url for url in URLS if f"`{url}`" not in text] == []


def test_words_for_a_default_hide_no_value() -> None:
    assert [option.name for option in OPTIONS if option.unset and option.usual != option.unset] == []


def test_example_env_lists_every_variable_and_each_value_is_accepted(tmp_path: Path) -> None:
    lines = (ROOT / ".example.env").read_text().splitlines()
    assignments = [line.removeprefix("# ") for line in lines if "=" in line]
    assert [line.split("=")[0] for line in assignments] == [option.env for option in OPTIONS]
    for line in assignments:
        path = tmp_path / ".env"
        path.write_text(line + "\n")
        if line.split("=")[0] in ("CANDLE_VLLM_MODELS_CONFIG", "CANDLE_VLLM_HF_TOKEN_PATH"):
            assert read_dotenv(path)  # they name files that need not exist
            continue
        beside = {"HF_TOKEN": "x"}
        if line.startswith(("CANDLE_VLLM_MAILBOX_", "CANDLE_VLLM_WEBHOOK_")):
            beside["CANDLE_VLLM_MAILBOX"] = "sqlite"  # without it they would set nothing, and are refused
        load_settings(SettingsSource("the command line"), beside, folder=tmp_path, home=tmp_path)


def test_example_models_file_is_accepted() -> None:
    models = read_models_file(ROOT / "example.models.yaml")
    assert models.default_model in models.models
    for source in models.models.values():
        Settings(**source.values)


def test_ranges_of_sampling_settings_are_those_of_the_engine() -> None:
    for option in OPTIONS:
        if option.group == SAMPLING:
            kind = option.kind
            assert isinstance(kind, (Integer, Number))
            low = kind.low + 1e-6 if isinstance(kind, Number) and kind.open_low else kind.low
            for value in (low, kind.high):
                given: dict[str, Any] = {option.name: value}
                SamplingParams(**given)
