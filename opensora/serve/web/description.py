"""The OpenAPI description, from the same tables that requests are checked by, and a page of it without a script."""

import html
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from opensora.sampling.cache_config import CACHE_CONFIGS
from opensora.sampling.options import MAX_SEED, SamplingOption
from opensora.serve.request import ALIASES, HINTS, MAX_PRIORITY, MAX_PROMPT, MAX_SECONDS, SAMPLING

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_LEAST = {"num_frames": 1, "num_steps": 1, "width": 1, "height": 1, "fps": 0.1, "cfg_channel": 1}
_ABOUT = {
    "prompt": "What to show",
    "model": "Name of GET /v1/models; the first where there is none",
    "seconds": "Length; the nearest one that the model can make",
    "size": "WIDTHxHEIGHT in pixels; sides are rounded up to the model's multiple",
    "input_reference": "Picture (PNG, JPEG, WebP) or, for kinds that take a clip, MP4",
    "negative_prompt": "What not to show",
    "cond_type": "What the references give, as i2v_head; the first kind that takes them where there is none",
    "lora": "Name of GET /v1/models",
    "priority": "Higher ones first",
    "seed": "Of the noise; drawn where there is none, and told in x.seed",
    "num_frames": "A length that the model can make, in place of seconds",
}


def request_schema(*, with_file: bool, needs_prompt: bool = True) -> Schema:
    """Of a request for a video; ``with_file``: as a form, else as JSON."""
    reference = {"type": "string", "format": "binary"} if with_file else {"$ref": "#/components/schemas/Reference"}
    properties: dict[str, Schema] = {
        "prompt": {**_TEXT, "minLength": 1, "maxLength": MAX_PROMPT},
        "model": _TEXT,
        "seconds": {"anyOf": [{**_NUMBER, "exclusiveMinimum": 0, "maximum": MAX_SECONDS}, _TEXT]},
        "size": {**_TEXT, "pattern": "^[0-9]{1,5}x[0-9]{1,5}$"},
        "input_reference": reference,
        "negative_prompt": {**_TEXT, "maxLength": MAX_PROMPT},
        "cond_type": _TEXT,
        "lora": _TEXT,
        "priority": {**_WHOLE, "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    }
    properties |= {name: _field_schema(name) for name in SAMPLING}
    properties |= {alias: _field_schema(name) for alias, name in ALIASES.items() if name in SAMPLING}
    for name, about in _ABOUT.items():
        properties[name] = {**properties[name], "description": about}
    required = {"required": ["prompt"]} if needs_prompt else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **required}


def _field_schema(name: str) -> Schema:
    """Of a field of SamplingOption, by its type and what is known of its range."""
    if name == "cache":
        kinds = {"type": "string", "enum": list(CACHE_CONFIGS)}
        return {"type": "object", "properties": {"kind": kinds}, "description": "Step cache; docs/configuration.md"}
    schema = _of_type(HINTS[name])
    most = SamplingOption.LIMITS.get(name)
    if most:
        schema |= {"minimum": _LEAST.get(name, 0), "maximum": most[0]}
    return schema


def _of_type(hint: Any) -> Schema:
    if get_origin(hint) is Literal:
        return {"type": "string", "enum": list(get_args(hint))}
    if get_origin(hint) is Union or isinstance(hint, types.UnionType):
        (one,) = (member for member in get_args(hint) if member is not type(None))
        plain = _of_type(one)
        return {**plain, "type": [plain["type"], "null"]}
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return {"type": names[hint]}


def _object(properties: Mapping[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_ERROR_TEXT = _object({"code": _TEXT, "message": _TEXT})
_EXTRAS = _object(
    {
        "queue_position": _or_null(_WHOLE),
        "eta_s": _or_null(_NUMBER),
        "step": _WHOLE,
        "steps": _WHOLE,
        "batch": _WHOLE,
        "attempt": _WHOLE,
        "seconds_used": _or_null(_NUMBER),
        "seed": {**_WHOLE, "minimum": 0, "maximum": MAX_SEED},
        "num_frames": {**_WHOLE, "minimum": 1},
        "fps": _NUMBER,
        "references": _WHOLE,
        "request": {"type": "object", "description": "Fields that ask for the same clip"},
    }
)
_SIZE: Schema = {**_TEXT, "pattern": "^[0-9]+x[0-9]+$"}
_VIDEO = _object(
    {
        "id": {**_TEXT, "pattern": "^video_[0-9a-f]{32}$"},
        "object": {"const": "video"},
        "model": _TEXT,
        "status": {**_TEXT, "enum": ["queued", "in_progress", "completed", "failed"]},
        "progress": {**_WHOLE, "minimum": 0, "maximum": 100},
        "created_at": _WHOLE,
        "completed_at": _or_null(_WHOLE),
        "expires_at": _or_null(_WHOLE),
        "prompt": _TEXT,
        "size": _SIZE,
        "seconds": _TEXT,
        "remixed_from_video_id": _or_null(_TEXT),
        "error": _or_null(_ERROR_TEXT),
        "x": _EXTRAS,
    }
)
_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _WHOLE,
        "owned_by": _TEXT,
        "x": _object(
            {
                "defaults": {"type": "object"},
                "neg": _TEXT,
                "multiple": _WHOLE,
                "sizes": {"type": "array", "items": _SIZE},
                "frames": {"type": "array", "items": _WHOLE},
                "seconds": {"type": "array", "items": _TEXT},
                "cond_types": {"type": "array", "items": _TEXT},
                "references": {"type": "object", "additionalProperties": _WHOLE},
                "loras": {"type": "array", "items": _TEXT},
                "room_bytes": _WHOLE,
                "ready": {"type": "boolean"},
            }
        ),
    }
)
_FORECAST = _object(
    {
        "object": {"const": "video.forecast"},
        "model": _TEXT,
        "size": _SIZE,
        "num_frames": _WHOLE,
        "fps": _NUMBER,
        "seconds": _TEXT,
        "steps": _WHOLE,
        "takes_s": {**_NUMBER, "description": "Seconds until it is there, were no other waiting"},
        "step_s": _NUMBER,
        "peak_gib": {**_NUMBER, "description": "Memory of a process"},
        "room_gib": {**_NUMBER, "description": "Memory that it may use; 0: not known"},
        "fits": {"type": "boolean"},
        "waiting": {**_WHOLE, "description": "Jobs in the queue"},
    }
)
SCHEMAS: Mapping[str, Schema] = {
    "Video": _VIDEO,
    "VideoPage": _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Video"}},
            "first_id": _or_null(_TEXT),
            "last_id": _or_null(_TEXT),
            "has_more": {"type": "boolean"},
        }
    ),
    "Deleted": _object({"id": _TEXT, "object": {"const": "video.deleted"}, "deleted": {"const": True}}),
    "Forecast": _FORECAST,
    "Model": _MODEL,
    "ModelPage": _object(
        {"object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}
    ),
    "Ready": _object({"status": _TEXT, "models": {"type": "array", "items": _TEXT}}),
    "Alive": _object({"status": _TEXT}),
    "Reference": _object({"image_url": {**_TEXT, "pattern": "^data:", "description": "data: URL in base64"}}),
    "Error": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)},
            )
        }
    ),
}


def answers(
    schema: str | None, about: str, *refusals: int, media: Mapping[str, Schema] | None = None
) -> dict[Any, Any]:
    """``responses`` of a route: what it gives, and how it may refuse."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}} if schema else {}
    content |= {kind: {"schema": one} for kind, one in (media or {}).items()}
    told: dict[Any, Any] = {200: {"description": about, "content": content}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in refusals:
        told[status] = {"description": _REFUSALS[status], "content": error}
    return told


_REFUSALS = {
    304: "Not changed",
    400: "A field or the body cannot be read",
    401: "No key, or another one",
    403: "Another page, or a priority, that is not allowed",
    404: "There is none",
    408: "The body came too slowly",
    409: "Not in this state, or another request with the same Idempotency-Key",
    413: "The body is too large",
    415: "Another Content-Type",
    416: "A range that is not there",
    422: "What the model cannot do, with what it can or the forecast",
    429: "As many wait as may; see Retry-After",
    501: "Not done by this service",
    503: "Not ready, or too busy; see Retry-After",
    507: "The disk is nearly full",
}


def body(*, needs_prompt: bool = True) -> Schema:
    """``openapi_extra`` of a route that takes a request for a video."""
    content = {
        "multipart/form-data": {"schema": request_schema(with_file=True, needs_prompt=needs_prompt)},
        "application/json": {"schema": request_schema(with_file=False, needs_prompt=needs_prompt)},
    }
    return {"requestBody": {"required": True, "content": content}}


REMIX_BODY: Schema = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _object({"prompt": {**_TEXT, "minLength": 1, "maxLength": MAX_PROMPT}}),
            }
        },
    }
}


def as_page(description: Mapping[str, Any]) -> str:
    """The description as HTML: every call, its fields and its answers."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>API</title>",
        '<meta name=viewport content="width=device-width"><link rel=stylesheet href=/page/page.css></head><body><main>',
        "<h1>API</h1><p>As data: <a href=/openapi.json>openapi.json</a></p>",
    ]
    for path, calls in description["paths"].items():
        for method, call in calls.items():
            parts.append(_call(method, path, call))
    return "".join([*parts, "</main></body></html>"])


def _call(method: str, path: str, call: Mapping[str, Any]) -> str:
    rows = [(one["name"], one.get("description", ""), one["schema"]) for one in call.get("parameters", ())]
    content = call.get("requestBody", {}).get("content", {})
    fields = next(iter(content.values()))["schema"]["properties"] if content else {}
    for name, schema in fields.items():
        rows.append((name, schema.get("description", ""), schema))
    lines = "".join(
        f"<tr><td><code>{_safe(name)}</code></td><td>{_safe(_kind(schema))}</td><td>{_safe(about)}</td></tr>"
        for name, about, schema in rows
    )
    answered = "".join(
        f"<li>{_safe(status)}: {_safe(one['description'])}</li>" for status, one in call["responses"].items()
    )
    table = f"<table>{lines}</table>" if lines else ""
    about = _safe(call.get("summary", ""))
    return f"<h2><code>{_safe(method.upper())} {_safe(path)}</code></h2><p>{about}</p>{table}<ul>{answered}</ul>"


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", "")
    names = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "maximum" in schema:
        least = schema.get("minimum", schema.get("exclusiveMinimum"))
        return f"{names} from {least} to {schema['maximum']}"
    return names or " or ".join(str(one.get("type", "")) for one in schema.get("anyOf", ()))


def _safe(text: Any) -> str:
    return html.escape(str(text))
