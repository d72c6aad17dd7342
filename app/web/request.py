"""A request as the connection read it, on its way to its answer."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from .answer import Answer


class Request:
    """What was asked, how much of it has come, and what is known about its answer."""

    method = url = version = ""
    headers: Sequence[tuple[bytes, bytes]] = ()
    # REMOTE_ADDR and the headers that this process looks at itself, by their WSGI names.
    environ: Mapping[str, str] = MappingProxyType({})
    server: tuple[str, int] = ("", 0)
    # What it takes in memory, roughly, without the body.
    size = 0
    # How many bytes of a body are of use.
    most = 0
    purchase = whole = gone = False
    # Whether the client waits to be told to send the body (RFC 9110, 10.1.1).
    expects_continue = False
    # Whether more may be asked on the connection after it.
    keep_alive = False
    # What the connection itself answers, where it is no request that could be served.
    refusal: Answer | None = None

    def __init__(self) -> None:
        self.body = bytearray()
