# SPDX-License-Identifier: MIT
"""HTTP around the routes: connections, TLS, paths, API keys, limits, streamed answers, and responses for failures."""
