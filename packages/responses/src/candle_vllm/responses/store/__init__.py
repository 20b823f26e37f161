# SPDX-License-Identifier: MIT
"""Stores of responses, conversations, answers and files: in memory, SQLite or PostgreSQL, limited in size."""
