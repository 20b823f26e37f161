# SPDX-License-Identifier: MIT
"""Stores of responses and conversations: SQLite or PostgreSQL, limited in size, separate for each API key."""
