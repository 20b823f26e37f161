# SPDX-License-Identifier: MIT
"""Wire types of the Responses API: requests, items, responses and the events of streams."""
