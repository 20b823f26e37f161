# SPDX-License-Identifier: MIT
"""HTTP routes, one module per family: step 1 of a request's life."""
