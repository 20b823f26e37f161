# SPDX-License-Identifier: MIT
"""The models of a server: downloading, loading and unloading them, and the queues of requests for them."""
