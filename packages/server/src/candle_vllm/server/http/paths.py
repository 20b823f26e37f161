"""The path of a request as the router takes it, for layers that decide before the router does (step 1)."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path as the router takes it: behind the prefix, where it is a folder of the path, without a last newline.

    The router's expressions end with `$`, which matches before such a newline as well.
    """
    path, root = scope["path"], scope.get("root_path", "")
    path = path[len(root) :] if root and path.startswith(root + "/") else path
    return path.removesuffix("\n")
