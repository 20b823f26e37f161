# SPDX-License-Identifier: MIT
"""How models write reasoning and tool calls: formats, a parser that reads them, and grammars that enforce them."""
