# SPDX-License-Identifier: MIT
"""Benchmarks of servers over HTTP (`bench serve`) and of the engine in this process (`bench throughput`, `latency`)."""
