# SPDX-License-Identifier: MIT
"""Step 6: the layers of which models are composed. Shape letters: T tokens, H heads, K key-value heads, D head size,
R rotated elements of a head, E hidden, F feed-forward, X experts, V vocabulary."""
