# SPDX-License-Identifier: MIT
"""MCP in the server: the servers of mcp.json, their tools in chat requests, and the calls that this server runs."""
