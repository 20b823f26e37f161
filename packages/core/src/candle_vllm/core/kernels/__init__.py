# SPDX-License-Identifier: MIT
"""Step 6, innermost: one folder per operation, with its contract and dispatch, its reference, and its backends."""
