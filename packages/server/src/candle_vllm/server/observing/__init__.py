# SPDX-License-Identifier: MIT
"""Observability: metrics, the log of requests, and traces, for every step of a request's life."""
