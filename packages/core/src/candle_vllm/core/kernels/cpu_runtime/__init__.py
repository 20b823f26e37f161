# SPDX-License-Identifier: MIT
"""Runtime of the compiled CPU kernels: emitted vector code, operations, threads, and the recorder of plans.

Terms: an operation is a compiled function (`operation.py`); a plan is a recorded step, an array with a row for each
operation (`recorder.py`); a team is the threads that run plans (`team.py`). An engine on a GPU runs plans only for
experts that the CPU computes. The modules that emit code need Numba; they are imported only to compile.
"""
