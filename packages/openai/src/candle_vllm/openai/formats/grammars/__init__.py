# SPDX-License-Identifier: MIT
"""Grammars of tool calls and of messages with headers, for the formats in the rows of `formats.table`."""
