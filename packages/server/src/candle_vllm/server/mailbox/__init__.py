# SPDX-License-Identifier: MIT
"""The mailbox: answers that are stored for a while or pushed to a webhook, always or if their client disconnected.

At step 1 of a request's life, `policy` reads what the request asks for; at step 10, `service.Mailbox` stores its answer
(`store`), pushes it (`webhook`), or both. Nothing is imported here, so that a server without a mailbox loads no
database library.
"""
