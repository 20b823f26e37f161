# SPDX-License-Identifier: MIT
"""Batches: many requests in a file, which a server answers beside other requests, or the command `run-batch`."""
