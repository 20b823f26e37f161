# SPDX-License-Identifier: MIT
"""Formats in which models generate reasoning and tool calls: a parser of them, and grammars that enforce them."""
