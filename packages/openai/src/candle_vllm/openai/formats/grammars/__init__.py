# SPDX-License-Identifier: MIT
"""Grammars of tool calls, derived from the rows of `formats.table`: one module for each format of calls."""
