# SPDX-License-Identifier: MIT
"""What the compiled CPU kernels share: emitted vector code, operations, threads, and the recorder of plans.

Everything here needs numba, and only a CPU engine imports it.
"""
