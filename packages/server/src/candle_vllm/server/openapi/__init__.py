# SPDX-License-Identifier: MIT
"""The OpenAPI document: requests and responses of every route, from the types that validate and encode them."""
