"""How a linear layer's sums are cut along K, and when the pieces are made side by side (step 6 of a request's life).

K is cut into **stretches** of whole blocks, by the matrix's shape alone. With few rows of activations a program makes
one stretch, and a second launch adds them in order; with many, a program makes all of them, and adds in the same order.
"""

from __future__ import annotations

MOST_SPLITS = 32


def split_blocks(blocks: int, tiles: int, programs: int, least: int) -> int:
    """Blocks of a stretch.

    Args:
        blocks: of K.
        tiles: of the matrix's rows.
        programs: how many are wanted where there is one tile of activations.
        least: blocks that make a program worth its start.
    """
    splits = min(max(programs // tiles, 1), MOST_SPLITS)
    return min(max(-(-blocks // splits), least), blocks)
