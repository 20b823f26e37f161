# SPDX-License-Identifier: MIT
"""MCP servers: their configuration, connections that come back, and their tools in the registry."""
