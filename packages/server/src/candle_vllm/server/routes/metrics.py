"""`/metrics` and `/v1/usage`: what the server has done so far, for Prometheus and for people."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.server.observing.exposition import render

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Every count, as Prometheus reads it."""
    accept = request.headers.get("accept", "")
    data, kind = await asyncio.to_thread(render, request.app.state.metrics.registry, accept)
    return Response(data, headers={"content-type": kind})


@router.get("/v1/usage")
async def usage(request: Request) -> Response:
    """Requests that have ended and their tokens, by model and API key, since the start."""
    rows = await asyncio.to_thread(request.app.state.metrics.usage)
    return Response(msgspec.json.encode({"object": "list", "data": rows}), media_type="application/json")
