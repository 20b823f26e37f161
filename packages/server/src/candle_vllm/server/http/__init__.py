# SPDX-License-Identifier: MIT
"""HTTP around the routes: limits, paths, keys, ids, events, and every failure as an answer."""
