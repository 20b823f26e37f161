# SPDX-License-Identifier: MIT
"""Set the switch interval of every Python process that a restless run starts (`tests/restless.py`)."""

import os
import sys

sys.setswitchinterval(float(os.environ.get("CANDLE_VLLM_TEST_SWITCH_INTERVAL", sys.getswitchinterval())))
