# SPDX-License-Identifier: MIT
"""Scheduler, batch, sequences, the engine and the thread that runs its steps."""
