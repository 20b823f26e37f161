# SPDX-License-Identifier: MIT
"""How models write thoughts and tool calls: formats, the parser that reads them, the grammars that hold them."""
