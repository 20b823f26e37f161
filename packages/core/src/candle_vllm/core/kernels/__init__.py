# SPDX-License-Identifier: MIT
"""Operations of layers and samplers, a folder each: contract, dispatch, kernels by backend, and often a reference."""
