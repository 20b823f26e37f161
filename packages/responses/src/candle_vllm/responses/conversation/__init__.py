# SPDX-License-Identifier: MIT
"""Conversation of a model and its tools: the loop between them, its events and transcript, and the models."""
