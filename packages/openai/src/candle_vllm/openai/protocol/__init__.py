# SPDX-License-Identifier: MIT
"""Wire types: requests are pydantic models (strict, nothing unknown), answers are msgspec structs (fast to encode)."""
