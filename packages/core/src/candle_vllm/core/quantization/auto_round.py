# SPDX-License-Identifier: MIT
"""AutoRound's checkpoints, which use the layouts of GPTQ and AWQ.

Source: Cheng et al., 2023, arXiv:2309.05516; the exporters of intel/auto-round.
"""

from __future__ import annotations

from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization import awq, gptq
from candle_vllm.core.quantization.finding import Found, StoredTensors

METHODS = ("auto-round",)


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the layers that AutoRound quantised."""
    layout = config.choice("packing_format", "auto_round:auto_gptq", "auto_round:auto_gptq", "auto_round:auto_awq")
    config.choice("data_type", "int", "int")
    if layout == "auto_round:auto_awq":
        yield from awq.layers(config, stored)
        return
    # Layers of 16 or 32 bits are not quantised.
    own = [
        value
        for value in config.section("extra_config").values.values()
        if not isinstance(value, dict) or value.get("bits") not in (16, 32)
    ]
    yield from gptq.layers_by_scheme(config, stored, own, zeros_less_one=True)
