"""A request as the connection read it, on its way to its answer."""

from .answer import Answer


class Request:
    """What was asked, how much of it has come, and what is known about its answer."""

    __slots__ = (
        "allowed", "body", "environ", "expects_continue", "gone", "headers", "keep_alive", "method",
        "most", "purchase", "refusal", "server", "size", "url", "version", "whole",
    )  # fmt: skip

    def __init__(self, environ: dict[str, str]) -> None:
        """`environ` is REMOTE_ADDR and what else this process looks at, by its WSGI name."""
        self.environ = environ
        self.body = bytearray()
        # What it takes in memory, roughly, without the body; and how much of a body is of use.
        self.size = self.most = 0
        self.purchase = self.whole = self.gone = False
        # Whether the client waits to be told to send the body (RFC 9110, 10.1.1).
        self.expects_continue = False
        # Whether more may be asked on the connection after it.
        self.keep_alive = False
        # What the connection itself answers: a preflight, and what could not be served.
        self.refusal: Answer | None = None
        # Headers that let a page of another origin read the answer.
        self.allowed: tuple[tuple[str, str], ...] = ()

    def is_page(
        self,
        method: str,
        url: bytes,
        version: str,
        headers: list[tuple[bytes, bytes]],
        server: tuple[str, int],
    ) -> None:
        """Note the rest of the head, which only Flask looks at; `server` is the own address."""
        self.method, self.url, self.version = method, url.decode("latin-1"), version
        self.headers, self.server = headers, server
