# SPDX-License-Identifier: MIT
"""The mailbox: finished answers of clients that disconnected, stored for a while or pushed to a webhook.

Used at step 10 of a request's life: `service.Mailbox` reads what a request asked for (`policy`), stores its answer
(`store`) and pushes it to a webhook if the request asked for that (`webhook`). Nothing is imported here, so
that a server without a mailbox loads no database library.
"""
