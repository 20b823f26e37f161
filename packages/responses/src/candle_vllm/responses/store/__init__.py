# SPDX-License-Identifier: MIT
"""Where responses and conversations are kept: SQLite or PostgreSQL, bounded, each API key's apart from the others."""
