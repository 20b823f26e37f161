"""Whether the server can answer: `/health`, `/ready` and `/version`.

Outside the ten steps: asked by load balancers and people. `/health` needs no key and says nothing but its status.
"""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelState

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the process can do its work, 503 once an engine has stopped that will not come back by itself."""
    manager: ModelManager = request.app.state.manager
    if manager.is_healthy:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "dead"}, status_code=503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while a request for the default model would be answered at once, 503 before and after, with the reason."""
    manager: ModelManager = request.app.state.manager
    if request.app.state.stopping():
        return JSONResponse({"status": "stopping"}, status_code=503)
    slot = manager.slots[manager.active]
    if slot.state is ModelState.READY and slot.model is not None:
        alive = slot.model.engine.is_alive
        return JSONResponse({"status": "ready" if alive else "dead"}, status_code=200 if alive else 503)
    # A model that was unloaded because nobody used it is loaded when it is asked for.
    rested = slot.state is ModelState.UNLOADED and slot.load_seconds is not None
    return JSONResponse({"status": slot.state.value}, status_code=200 if rested else 503)


@router.get("/version")
async def server_version() -> dict[str, str]:
    """The version of the server package."""
    return {"version": version("candle-vllm-server")}


@router.get("/")
async def root(request: Request) -> dict[str, object]:
    """What this is and where to go on."""
    manager: ModelManager = request.app.state.manager
    return {
        "name": "candle-vllm",
        "version": version("candle-vllm-server"),
        "models": [name for slot in manager.slots.values() for name in slot.entry.names],
        "openai_base_url": "/v1",
    }
