# SPDX-License-Identifier: MIT
"""Tools: their definitions, names and registry, approval, and how one call runs."""
