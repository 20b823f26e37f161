# SPDX-License-Identifier: MIT
"""The Responses API without HTTP: requests to conversations, and their events to responses."""
