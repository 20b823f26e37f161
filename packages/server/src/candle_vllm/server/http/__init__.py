# SPDX-License-Identifier: MIT
"""HTTP around the routes: limits, paths, API keys, request ids, server-sent events, and responses for failures."""
