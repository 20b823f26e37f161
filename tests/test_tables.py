# SPDX-License-Identifier: MIT
"""Tables of pages are what the code reads, and foreign flags do what the pages say."""

from __future__ import annotations

import re

import pytest
from deploy.site.tables import CONFIG, PAGES, PROGRAMS, ROOT, TABLES, filled, flags_of, with_settings

from candle_vllm.server.settings.command_line import SHORT, flag_commands, parse
from candle_vllm.server.settings.foreign_flags import ANY, foreign_flags
from candle_vllm.server.settings.options import UsageError

CASES = {f"{flag} {value}".strip(): (flag, value, row) for flag, row in foreign_flags().items()
         for value in row.becomes if value != ANY and not callable(row.becomes[value])}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_tables_that_the_code_has(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m deploy.site.tables"


def test_the_settings_of_an_engine_are_those_of_its_config() -> None:
    source = CONFIG.read_text(encoding="utf-8")
    assert with_settings(source) == source, "run python -m deploy.site.tables"
    assert with_settings(source.replace("    open_objects: bool\n", "")) == source


def test_every_table_stands_in_a_page() -> None:
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in PAGES)
    assert [name for name in TABLES if pages.count(f"<!-- table: {name} -->") != 1] == []


def test_every_flag_is_somebodys_and_exists_or_is_answered() -> None:
    listed = {flag for program in PROGRAMS for flag in flags_of(program)}
    assert foreign_flags().keys() - listed == set()
    assert listed - {*foreign_flags(), *flag_commands(), *SHORT, "--version", "--help", "-h"} == set()


@pytest.mark.parametrize("case", CASES)
def test_what_the_table_takes_is_taken(case: str) -> None:
    flag, value, row = CASES[case]
    stands = row.becomes[value]
    assert isinstance(stands, str)
    ours = [text.partition(".")[0] for text in stands.split() if text.startswith("--")]
    if all("serve" in flag_commands()[each] for each in ours):
        source, _ = parse("serve", [flag, value] if value else [flag])
        remarked = any(f"{flag} has no effect here" in remark for remark in source.remarks)
        assert remarked is (row.idle and not stands)


@pytest.mark.parametrize(
    "flag", [flag for flag, row in foreign_flags().items() if not row.becomes and flag not in SHORT]
)
def test_what_the_table_refuses_ends_the_start_with_its_answer(flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("serve", [flag])
    assert re.split("[,;]", foreign_flags()[flag].answer)[0] in str(caught.value)


SNIPPETS = (
    "serve Qwen/Qwen3-4B --trust-remote-code --enforce-eager --swap-space 4 --max-logprobs 100",
    "serve org/name --structured-outputs-config.backend xgrammar --guided-decoding-backend outlines",
    "serve org/name --stream-interval 4 --response-role assistant --chat-template-content-format openai",
    "serve org/name --enable-auto-tool-choice --tool-call-parser hermes --api-server-count 2 --disable-log-stats",
    "-m a.gguf -c 4096 -n 128 --repeat-penalty 1.1 --chat-template chatml -ngl 99 --jinja --cache-reuse 256 -sm layer",
    "serve org/name --mm-processor-cache-gb 0 --safetensors-load-strategy lazy --performance-mode balanced -cc.mode 3",
    "serve org/name --enable-eplb --disable-cascade-attn --mamba-ssm-cache-dtype float32 --profiler-config {}",
    "-m a.gguf -no-kvu --cache-idle-slots -cms 256 --sse-ping-interval 30 --reuse-port --spec-draft-ngl 99 --tags x",
    "-m a.gguf -n -1 --keep 4 --context-shift --cache-ram 1024 --log-disable -fa on --mlock --no-warmup",
)


@pytest.mark.parametrize("line", SNIPPETS)
def test_what_snippets_contain_ends_no_start(line: str) -> None:
    first, *rest = line.split()
    parse("serve", rest if first == "serve" else [first, *rest])
