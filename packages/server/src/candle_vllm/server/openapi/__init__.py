# SPDX-License-Identifier: MIT
"""The OpenAPI document: what every route takes and gives, from the types that check and encode it."""
