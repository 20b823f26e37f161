"""`/v1/models`: which names this server answers to (step 1 of a request's life)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.openai import to_json_bytes
from candle_vllm.server.errors import HttpError

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """All served names."""
    return Response(to_json_bytes(request.app.state.adapter.models()), media_type="application/json")


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """One served name; names may hold slashes."""
    cards = request.app.state.adapter.models().data
    for card in cards:
        if card.id == model_id:
            return Response(to_json_bytes(card), media_type="application/json")
    served = ", ".join(card.id for card in cards)
    raise HttpError(404, f"The model {model_id!r:.200} does not exist here; served: {served}.", "model_not_found")
