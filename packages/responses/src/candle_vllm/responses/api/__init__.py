# SPDX-License-Identifier: MIT
"""The Responses API without HTTP: makes conversations of requests, and responses of the conversations' events."""
