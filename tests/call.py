"""Requests to a running server, with nothing between the test and the wire."""

import json
import urllib.error
import urllib.request
from email.message import Message
from typing import NamedTuple

from waiting import patience


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def call(
    url: str, body: object = None, method: str | None = None, headers: dict | None = None, tls=None
) -> Answer:
    """Send one request; `body` is sent as JSON. Any status is an answer."""
    headers = {"Content-Type": "application/json"} | (headers or {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=patience(15), context=tls)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return Answer(response.status, response.headers, response.read())
