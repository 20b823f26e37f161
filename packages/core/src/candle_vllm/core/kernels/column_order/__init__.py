"""Columns of rows in another order, for matrices whose groups of inputs are no neighbours.

Part of step 6 of a request's life.

Contract: x float32 [R, K]; `order` K column numbers; out[t, i] = x[t, order[i]] float32, rows any distance apart in
both, exactly. `out` shares no memory with x. Recorded steps have it as an operation of their own, `cpu.py`, which may
pick rows of x; on a GPU torch's `index_select` does it.
"""
