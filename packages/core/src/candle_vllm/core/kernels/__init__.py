# SPDX-License-Identifier: MIT
"""The operations of layers and samplers: a folder each, with contract and dispatch, reference, and backends."""
