# SPDX-License-Identifier: MIT
"""Batches: many requests in a file, answered by a server beside other requests, or by the command `run-batch`."""
