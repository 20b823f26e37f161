# SPDX-License-Identifier: MIT
"""Step 6: the layers of which models are composed. Shape letters: T tokens, H heads, K key-value heads, D head size,
E hidden, F feed-forward, V vocabulary, B blocks, S block size."""
