# SPDX-License-Identifier: MIT
"""Tools: what they are, their names and registry, approval, and how one call of them runs."""
