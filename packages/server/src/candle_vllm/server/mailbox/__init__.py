# SPDX-License-Identifier: MIT
"""The mailbox: finished answers of clients that have gone, kept for a while or pushed to a webhook.

It hangs off step 10 of a request's life: `service.Mailbox` reads what a request asked for (`policy`), keeps its
answer (`store`) and pushes it where that was asked for (`delivery`, `webhook`, `targets`). Nothing is imported here,
so that a server without a mailbox loads no database library.
"""
