# SPDX-License-Identifier: MIT
"""Run a step through the model: recorded on the CPU, captured on a GPU, op by op elsewhere."""
