"""The document rearranged as the page at /docs reads it: everything looked up, nothing nested."""

import json
import shlex
from functools import cache
from typing import Any

from .document import document

METHODS = ("get", "post", "patch", "put", "delete")
# Told once for all operations; a list of them below each would hide what is particular.
COMMON = ("X-Request-Id",)
LINE_CHARACTERS = 60


@cache
def operations() -> dict[str, list[dict[str, Any]]]:
    """Return {tag: operations}, each with what the page shows of it."""
    tagged: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document()["tags"]}
    for path, item in document()["paths"].items():
        for method in METHODS:
            if method in item:
                tagged[item[method]["tags"][0]].append(_operation(method, path, item[method]))
    return tagged


def _operation(method: str, path: str, operation: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    return {
        "id": operation["operationId"],
        "method": method.upper(),
        "path": path,
        "summary": operation["summary"],
        "description": operation.get("description", ""),
        "security": [name for entry in operation.get("security", ()) for name in entry],
        "parameters": [
            {
                "name": parameter["name"],
                "where": parameter["in"],
                "required": parameter["required"],
                "type": _type(parameter["schema"]),
                "meaning": parameter["description"],
            }
            for parameter in operation.get("parameters", ())
            if parameter["name"] not in COMMON
        ],
        "fields": _fields(body["schema"]) if body else [],
        "command": _command(method, path, operation, _example(body, None) if body else ""),
        # What only reads, and for anybody, can be tried by a click. The rest acts on a real sale.
        "link": _with_examples(path, operation)
        if method == "get" and not _tokens(operation)
        else "",
        "responses": [
            _response(status, response) for status, response in operation["responses"].items()
        ],
    }


def _with_examples(path: str, operation: dict[str, Any]) -> str:
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", "1")
    return path


def _tokens(operation: dict[str, Any]) -> list[str]:
    """Return the kinds of token of which an operation needs one."""
    entries = operation.get("security", ())
    return [] if {} in entries else [name for entry in entries for name in entry]


def _command(method: str, path: str, operation: dict[str, Any], body: str) -> str:
    """Return the request as a command for a shell, with what it needs and no more."""
    parameters = operation.get("parameters", ())
    words = ["curl"] + [f"-X {method.upper()}"] * (method not in ("get", "post"))
    words.append(f'"$SHOP{_with_examples(path, operation)}"')
    if tokens := _tokens(operation):
        words.append(f'-H "Authorization: Bearer ${tokens[0].upper()}_TOKEN"')
    if any(parameter["name"] == "Idempotency-Key" for parameter in parameters):
        words.append('-H "Idempotency-Key: $(uuidgen)"')
    if body:
        words += ['-H "Content-Type: application/json"', f"-d {shlex.quote(body)}"]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > LINE_CHARACTERS:
            lines.append("  " + word)
        else:
            lines[-1] += " " + word
    return " \\\n".join(lines)


def _response(status: str, response: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = next(iter(response.get("content", {}).values()), {})
    examples = [example["value"] for example in content.get("examples", {}).values()]
    fails = int(status) >= 400 and all("code" in example for example in examples)
    return {
        "status": status,
        "meaning": response["description"],
        "codes": [example["code"] for example in examples] if fails else [],
        "headers": [name for name in response["headers"] if name not in COMMON],
        "example": "" if fails and len(examples) > 1 else _example(content),
    }


def _example(content: dict[str, Any], indent: int | None = 2) -> str:
    examples = list(content.get("examples", {}).values())
    return json.dumps(examples[0]["value"], indent=indent) if examples else ""


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        schema = document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _fields(schema: dict[str, Any], required: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    schema = _resolve(schema)
    required = required | set(schema.get("required", ()))
    fields = [field for part in schema.get("allOf", ()) for field in _fields(part, required)]
    return fields + [
        {
            "name": name,
            "required": name in required,
            "type": _type(entry),
            "meaning": entry.get("description", ""),
        }
        for name, entry in schema.get("properties", {}).items()
    ]


def _type(schema: dict[str, Any]) -> str:
    """Return the type and its bounds in a few words."""
    schema = _resolve(schema)
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    kinds = schema.get("type", "value")
    words = " or ".join(kinds) if isinstance(kinds, list) else kinds
    if "format" in schema:
        words += f" ({schema['format']})"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        words += f", {low:,} … {high:,}"
    if "maxLength" in schema:
        words += f", {schema.get('minLength', 0)} … {schema['maxLength']} characters"
    if "default" in schema:
        words += f"; default {json.dumps(schema['default'])}"
    return words
