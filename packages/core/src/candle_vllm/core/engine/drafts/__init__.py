# SPDX-License-Identifier: MIT
"""Draft tokens for speculative decoding: from repeats, a draft model or a draft head."""
