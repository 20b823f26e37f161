# SPDX-License-Identifier: MIT
"""Measuring: servers from outside (`bench serve`), the engine in this process (`bench throughput`, `bench latency`)."""
