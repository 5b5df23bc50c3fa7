"""The OpenAPI page for people: plain HTML without scripts, so that nothing of other hosts runs beside an API key."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
code,td:first-child{font-family:ui-monospace,monospace}table{border-collapse:collapse;width:100%}
td,th{border-top:1px solid #8886;padding:.3rem .6rem .3rem 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
CONTENT_SECURITY = f"default-src 'none'; style-src 'sha256-{_HASH}'; frame-ancestors 'none'"
"""What its answer has to allow."""


def reference(page: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI page."""
    title = escape(page["info"]["title"])
    intro = "".join(f"<p>{escape(part)}</p>" for part in page["info"]["description"].split("\n\n"))
    parts = [
        f"<section>{''.join(_operation(path, method, operation))}</section>"
        for path, methods in page["paths"].items()
        for method, operation in methods.items()
    ]
    link = '<p><a href="openapi.json">openapi.json</a></p>'
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en">{head}<style>{_STYLE}</style><h1>{title}</h1>{intro}{link}{"".join(parts)}</html>'


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        fields = schema.get("properties", {})
        required = schema.get("required", [])
        rows = "".join(_row(name, field, is_required=name in required) for name, field in fields.items())
        yield f"<table><tr><th>{media_type}</th><th></th><th></th></tr>{rows}</table>"
    rows = "".join(
        f"<tr><td>{status}</td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    yield f"<table>{rows}</table>"


def _row(name: str, field: Mapping[str, Any], *, is_required: bool) -> str:
    default = "required" if is_required else "" if field.get("default") is None else f"default {field['default']}"
    return (
        f"<tr><td>{escape(name)}</td><td>{escape(_kind(field))}</td>"
        f"<td>{escape(field.get('description', ''))} {escape(default)}</td></tr>"
    )


def _kind(field: Mapping[str, Any]) -> str:
    """What a field may be."""
    if "anyOf" in field:
        return " | ".join(_kind(kind) for kind in field["anyOf"] if kind.get("type") != "null")
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    return "file" if field.get("format") == "binary" else str(field.get("type", field.get("const", "object")))
