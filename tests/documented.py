"""A test client that fails any test in which the API answers what its description does not tell."""

import re
from functools import cache

from flask.testing import FlaskClient

from app.web.openapi import document

# A method that a route does not know is answered alike everywhere; no operation describes it.
NOT_OF_AN_OPERATION = {405}


@cache
def routes() -> list[tuple]:
    """Return (pattern of the path, {method: {status: names of headers}})."""
    found = []
    for path, item in document()["paths"].items():
        operations = {
            method.upper(): {
                int(status): set(response["headers"])
                for status, response in operation["responses"].items()
            }
            for method, operation in item.items()
        }
        found.append((re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + "$"), operations))
    return found


TOLD_HEADERS = {
    "RateLimit", "RateLimit-Policy", "Retry-After", "Idempotent-Replayed", "Location", "ETag",
}  # fmt: skip


class DocumentedClient(FlaskClient):
    def open(self, *args, **kwargs):
        answer = super().open(*args, **kwargs)
        check(answer.request.method, answer.request.path, answer)
        return answer


def check(method: str, path: str, answer) -> None:
    for pattern, operations in routes():
        if pattern.match(path) and method in operations:
            told = operations[method]
            if answer.status_code in NOT_OF_AN_OPERATION:
                continue
            assert answer.status_code in told, f"{method} {path}: {answer.status_code} is not told"
            extra = {name for name in TOLD_HEADERS if name in answer.headers}
            extra -= told[answer.status_code]
            assert not extra, f"{method} {path} {answer.status_code}: {extra} is not told"
            return
