# SPDX-License-Identifier: MIT
"""Write `.cog/openapi_schema.json` from the predictor's signature, so that its server also runs without `cog build`.

python schema.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cog._inspector import create_predictor  # what Cog itself reads a predictor with

SCHEMA = Path(__file__).parent / ".cog" / "openapi_schema.json"
_BOUNDS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength", "regex": "pattern"}
_STATES = ["starting", "processing", "succeeded", "canceled", "failed"]


def schema() -> dict[str, Any]:
    """Return the parts of the OpenAPI document of `cog build` that Cog's server reads."""
    made = create_predictor("predict", "Runner")
    properties: dict[str, Any] = {}
    for name, field in sorted(made.inputs.items(), key=lambda item: item[1].order):
        about = {"title": name.replace("_", " ").title(), "x-order": field.order, **field.type.json_type()}
        if field.description:
            about["description"] = field.description
        if field.default is None:
            about["nullable"] = True
        else:
            about["default"] = field.default
        bounds = {word: getattr(field, ours) for ours, word in _BOUNDS.items() if getattr(field, ours) is not None}
        properties[name] = about | bounds
    given = {"$ref": "#/components/schemas/Input"}
    request = {"type": "object", "properties": {"id": {"type": "string"}, "input": given}}
    answer = {
        "type": "object",
        "properties": {
            "input": given,
            "output": {"$ref": "#/components/schemas/Output"},
            "status": {"type": "string", "enum": _STATES},
            "error": {"type": "string"},
            "metrics": {"type": "object"},
        },
    }
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}}
    said = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionResponse"}}}}
    post = {"summary": "Predict", "requestBody": body, "responses": {"200": {"description": "done", **said}}}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/predictions": {"post": post | {"x-cog-streaming": True}}},
        "components": {
            "schemas": {
                "Input": {"title": "Input", "type": "object", "properties": properties},
                "Output": made.output.json_type(),
                "PredictionRequest": request,
                "PredictionResponse": answer,
            }
        },
    }


if __name__ == "__main__":
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
