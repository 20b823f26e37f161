# SPDX-License-Identifier: MIT
"""The HTTP server and the command line: step 1 and the last half of step 10 of a request's life.

`Settings` and `create_app` are imported on first use, so that `candle-vllm --help` loads no web framework.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # not imported from typing, because that would delay the handling of Ctrl+C
if TYPE_CHECKING:
    from typing import Any

    from candle_vllm.server.app import create_app
    from candle_vllm.server.settings import Settings
    from candle_vllm.server.settings.configuration import load_settings

__all__ = ["Settings", "create_app", "load_settings"]
_MODULES = {"Settings": "settings", "create_app": "app", "load_settings": "settings.configuration"}

# Read when huggingface_hub is imported, which would otherwise ask the hub which coding agents there are.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name in __all__:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        from candle_vllm.core.arguments import missing_name

        raise missing_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return [*__all__]
