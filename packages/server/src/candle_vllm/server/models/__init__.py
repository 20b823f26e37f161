# SPDX-License-Identifier: MIT
"""Which models there are, and how a request gets the one that it asks for."""
