# SPDX-License-Identifier: MIT
"""What the server shows of its work: metrics, the log of requests, traces. It sees every step of a request's life."""
