"""The description of the server's paths, generated from the models that check requests."""

from typing import Any

from pydantic import BaseModel

from stagdist.serving.api.problems import TYPES
from stagdist.serving.api.wire import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from stagdist.serving.settings import ServerSettings

_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionRequest, "Complete texts or lists of token ids."),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation."),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation."),
    "/detokenize": (DetokenizeRequest, "Text of token ids."),
}
_READS = {
    "/v1/models": "The names of the model.",
    "/v1/models/{model}": "One of them.",
    "/tokenizer_info": "Special tokens and the chat template.",
    "/health": "Whether requests are served.",
    "/live": "Whether the HTTP process runs.",
    "/version": "The version of the server.",
    "/metrics": "Metrics for Prometheus.",
    "/slots": "State of the engine and its slots.",
}
_REFERENCE = "#/components/schemas/{model}"
_STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 501, 503, 504)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer"]},
            },
        }
    },
}


def openapi(version: str, settings: ServerSettings) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (model, text) in _BODIES.items():
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}}
        paths[path] = {"post": _operation(text, _STATUSES) | {"requestBody": {"required": True, "content": content}}}
    for path, text in _READS.items():
        paths[path] = {"get": _operation(text, (401, 404, 503))}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"]["get"]["parameters"] = [name]
    components: dict[str, Any] = {"schemas": schemas}
    if settings.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path in _BODIES:
            paths[path]["post"]["security"] = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "stagdist", "version": version},
        "servers": [{"url": settings.root_path.rstrip("/") or "/"}],
        "paths": paths,
        "components": components,
    }


def _operation(text: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    responses: dict[str, Any] = {"200": {"description": "The answer."}}
    responses |= {str(status): {"description": TYPES[status], "content": error} for status in statuses}
    return {"summary": text, "responses": responses}
