# SPDX-License-Identifier: MIT
"""Batches: many requests in a file, answered beside everybody else's or on a command line of their own."""
