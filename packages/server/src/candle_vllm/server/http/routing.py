"""The path and the method of a request as the router takes them (step 1)."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """The path, for layers that decide before the router does.

    That is behind the prefix, where it is a folder of the path, and without a last newline.

    The router's expressions end with `$`, which matches before such a newline as well.
    """
    path, root = scope["path"], scope.get("root_path", "")
    path = path[len(root) :] if root and path.startswith(root + "/") else path
    return path.removesuffix("\n")


class HeadMiddleware:
    """HEAD wherever there is GET, for load balancers and uptime checks.

    The routes are asked for GET; the HTTP protocol below, which knows that it was HEAD, sends no body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")  # for the layers that count
