# SPDX-License-Identifier: MIT
"""Turns of a model and the tools between them: one loop, its events, its transcript, and the models it asks."""
