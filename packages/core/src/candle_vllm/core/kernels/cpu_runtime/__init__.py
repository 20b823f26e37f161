# SPDX-License-Identifier: MIT
"""Runtime of the compiled CPU kernels: emitted vector code, operations, threads, and the recorder of plans.

Everything here needs numba, and only a CPU engine imports it.
"""
