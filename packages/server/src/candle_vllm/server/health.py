"""Whether the engine can serve: `/health` and `/version`.

Outside the ten steps: asked by load balancers and people. `/health` needs no key and says nothing but its status.
"""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine takes requests, 503 once it has stopped."""
    if request.app.state.engine.is_alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "dead"}, status_code=503)


@router.get("/version")
async def server_version() -> dict[str, str]:
    """The version of the server package."""
    return {"version": version("candle-vllm-server")}


@router.get("/")
async def root(request: Request) -> dict[str, object]:
    """What this is and where to go on."""
    return {
        "name": "candle-vllm",
        "version": version("candle-vllm-server"),
        "models": [card.id for card in request.app.state.adapter.models().data],
        "openai_base_url": "/v1",
    }
