# SPDX-License-Identifier: MIT
"""Conversation of a model and its tools: one loop, its events, its transcript, and the models that answer."""
