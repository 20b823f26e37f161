# SPDX-License-Identifier: MIT
"""Wire types: requests are pydantic models (strict, no unknown fields), responses are msgspec structs (fast)."""
