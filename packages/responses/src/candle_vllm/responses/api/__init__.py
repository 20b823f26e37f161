# SPDX-License-Identifier: MIT
"""The Responses API without HTTP: converts requests to conversations, and the conversations' events to responses."""
