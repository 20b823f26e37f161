# SPDX-License-Identifier: MIT
"""The mailbox: finished answers of clients that disconnected, stored for a while or pushed to a webhook.

At step 1 of a request's life, `policy` reads what the request asks for; at step 10, `service.Mailbox` stores its answer
(`store`) or pushes it (`webhook`). Nothing is imported here, so that a server without a mailbox loads no database
library.
"""
