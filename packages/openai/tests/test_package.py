# SPDX-License-Identifier: MIT
"""The package's boundary, and that its README tells what its tables hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import candle_vllm.openai as package
from candle_vllm.core.sampling import params
from candle_vllm.openai import json_body
from candle_vllm.openai.protocol import fields

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_importing_it_brings_no_web_framework_no_mcp_and_no_torch() -> None:
    code = (
        "import sys, candle_vllm.openai\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'fastapi', 'starlette', 'uvicorn', 'mcp', 'openai', 'torch', 'httpx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    assert all(hasattr(package, name) for name in package.__all__)
    assert list(package.__all__) == sorted(package.__all__, key=lambda name: (name.upper() != name, name))


def test_readme_lists_every_field_without_effect_every_refused_one_and_every_cap() -> None:
    for name, reason in fields.ADVISORY_FIELDS.items():
        assert f"| `{name}` | {reason} |" in README
    for name, refusal in fields.REFUSED_FIELDS.items():
        assert f"| `{name}` | {refusal.reason} |" in README
    caps = {name: value for name, value in vars(fields).items() if name.startswith("MAX_") and name != "MAX_PRIORITY"}
    caps |= {name: value for name, value in vars(json_body).items() if name.startswith("MAX_")}
    caps |= {"MAX_SEQUENCES": params.MAX_SEQUENCES}
    for name, value in caps.items():
        assert f"| `{name}` | {value} |" in README, name
