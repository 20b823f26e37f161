# SPDX-License-Identifier: MIT
"""Adapters by the name that a request gives its model: where they come from, what is kept of them, who may have one."""
