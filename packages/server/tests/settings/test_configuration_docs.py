# SPDX-License-Identifier: MIT
"""docs/configuration.md, .example.env and example.models.yaml list exactly what the table of settings has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from candle_vllm.core import EngineConfig, SamplingParams
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
ROW = re.compile(r"\| (`--.*?) \| `(CANDLE_VLLM_\w+)` \| (\S+) \| (.*?) \| (.*) \|")


def _rows() -> dict[str, tuple[str, str, str, str]]:
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = [match.groups() for line in text.splitlines() if (match := ROW.fullmatch(line))]
    assert len({env for _, env, *_ in rows}) == len(rows)
    return {env: (flags, yaml, default, meaning) for flags, env, yaml, default, meaning in rows}


def test_every_setting_of_the_engine_is_reached_from_the_server() -> None:
    """What is not handed on as it is, `engine_config` makes itself."""
    handed_on = [option.engine for option in OPTIONS if option.engine is not None]
    assert {*handed_on, "model", "weight_file", "chat_template"} == set(SETTINGS)
    assert len(handed_on) == len(set(handed_on)) == len(SETTINGS) - 3


def test_flags_are_unique() -> None:
    flags = [flag for option in OPTIONS for flag in (*option.flags, *option.constants)]
    assert len(flags) == len(set(flags))


def test_configuration_page_lists_every_setting() -> None:
    rows = _rows()
    assert set(rows) == {option.env for option in OPTIONS}
    for option in OPTIONS:
        flags, yaml, _, meaning = rows[option.env]
        assert flags.split() == [f"`{flag}`" for flag in (*option.flags, *option.constants)]
        assert yaml == (f"`{option.name}`" if option.in_yaml else "–")
        assert meaning == option.help


def test_mailbox_page_names_the_urls_of_stores() -> None:
    text = (ROOT / "docs" / "mailbox.md").read_text()
    assert [url for url in URLS if f"`{url}`" not in text] == []


def test_configuration_page_has_the_defaults() -> None:
    rows = _rows()
    ours = {field.name: field.default for field in dataclasses.fields(Settings)}
    engines = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    for option in OPTIONS:
        default = ours[option.name] if ours[option.name] is not None else engines.get(option.name)
        if default not in (None, (), dataclasses.MISSING):
            text = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[option.env][2] == f"`{text}`", option.name


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
