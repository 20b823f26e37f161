# SPDX-License-Identifier: MIT
"""MCP servers: their configuration, connections that are restored, and their tools in the tool registry."""
