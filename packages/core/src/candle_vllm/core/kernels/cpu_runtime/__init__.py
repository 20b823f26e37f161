# SPDX-License-Identifier: MIT
"""Runtime of the compiled CPU kernels: emitted vector code, operations, threads, and the recorder of plans.

Only a CPU engine imports it. The modules that emit code need Numba; they are imported only to compile.
"""
