"""One POST to an address that a customer chose: bounded in time, to where it may go, no redirects.

httpcore speaks HTTP and TLS. What it connects to is decided here, after the name was resolved, and
that very address is connected to: a name that changes its mind meanwhile changes nothing.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import httpcore

# All of an attempt: name, connection, TLS, sending, and the answer's head.
SECONDS = 5.0
# What is read of an answer's body, which means nothing here, so that the connection can be kept.
BODY_BYTES = 64 * 1024
BODY_SECONDS = 0.5
# Names are looked up in threads, as the system's resolver can't be told how long to take.
RESOLVERS = 8
NAT64 = ipaddress.ip_network("64:ff9b::/96")

# What a request on a connection meets that its peer has closed.
CLOSED = (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError)


class Refused(Exception):
    """The address is none that may be connected to."""


class Outcome(NamedTuple):
    """What came of an attempt: a status, or in `error` why there is none."""

    milliseconds: int
    status: int | None = None
    error: str | None = None
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def final(self) -> bool:
        """Whether the answer says that another attempt would be of no use."""
        return self.status is not None and not (
            self.delivered or self.status >= 500 or self.status in (408, 425, 429)
        )

    def __str__(self) -> str:
        return self.error or f"answered {self.status}"


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the Internet's, whatever it is wrapped in."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        within = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            within = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if within:
            return is_public(str(within))
        if ip.is_site_local:
            # Withdrawn (RFC 3879), so that it counts as global; networks may have it still.
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Stream(httpcore.NetworkStream):
    """A stream whose every wait ends at the attempt's own end."""

    def __init__(self, stream: httpcore.NetworkStream, network: "Network") -> None:
        self._stream, self._network = stream, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._network.left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # In pieces: the stream beneath waits as long for each.
        for begin in range(0, len(buffer), 65_536):
            left = self._network.left(httpcore.WriteTimeout)
            self._stream.write(buffer[begin : begin + 65_536], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = self._network.left(httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Network(httpcore.NetworkBackend):
    """Connects to public addresses alone, unless told otherwise."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._backend = httpcore.SyncBackend()
        self.until = 0.0
        # How many were opened.
        self.connections = 0

    def left(self, late: type[Exception]) -> float:
        """Return the seconds that are left of the attempt. Raises `late` when there are none."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise late("not answered in time")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        found = self._resolve(host, port)
        allowed = [address for address in found if self._allow_private or is_public(address)]
        if not allowed:
            raise Refused("the name leads to a private address")
        error: Exception = httpcore.ConnectError("the name leads nowhere")
        for address in allowed:
            left = self.left(httpcore.ConnectTimeout)
            try:
                stream = self._backend.connect_tcp(address, port, left)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
            else:
                self.connections += 1
                return _Stream(stream, self)
        raise error

    def _resolve(self, host: str, port: int) -> list[str]:
        """Return the numeric addresses of a host, which nobody has to look up again."""
        looking = _resolvers().submit(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        try:
            found = looking.result(self.left(httpcore.ConnectTimeout))
        except Late:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError("the name can't be resolved") from error
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        return [socket.getnameinfo(address, numeric)[0] for *_, address in found]


@cache
def _resolvers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(RESOLVERS, "resolve")


class Sender:
    """Sends to one endpoint after the other message, on a connection that is kept meanwhile."""

    def __init__(self, allow_private: bool, context: ssl.SSLContext | None = None) -> None:
        """`context` says whom TLS trusts: the system's authorities unless it is given."""
        self._network = Network(allow_private)
        self._pool = httpcore.ConnectionPool(
            ssl_context=context or ssl.create_default_context(),
            max_connections=1,
            network_backend=self._network,
        )

    def __enter__(self) -> "Sender":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.close()

    def post(
        self, url: str, headers: Mapping[str, str], body: bytes, seconds: float = SECONDS
    ) -> Outcome:
        """Send a message once and return what came of it; it never raises."""
        started = time.monotonic()
        self._network.until = started + seconds
        before = self._network.connections

        def outcome(**told: Any) -> Outcome:
            return Outcome(round((time.monotonic() - started) * 1000), **told)

        try:
            with self._pool.stream(
                "POST", url, headers=list(headers.items()), content=body
            ) as response:
                found = outcome(status=response.status, retry_after=_retry_after(response.headers))
                self._read_off(response)
                return found
        except Exception as error:
            left = self._network.until - time.monotonic()
            if isinstance(error, CLOSED) and self._network.connections == before and left > 0:
                # A kept connection that was closed meanwhile: that says nothing of the message.
                return self.post(url, headers, body, left)
            return outcome(error=_in_words(error))

    def _read_off(self, response: httpcore.Response) -> None:
        """Read the rest of a short answer; the answer counts whatever comes of that."""
        self._network.until = min(self._network.until, time.monotonic() + BODY_SECONDS)
        read = 0
        with suppress(Exception):
            for chunk in response.iter_stream():
                read += len(chunk)
                if read > BODY_BYTES:
                    return


def _retry_after(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Return the seconds that a Retry-After asks for (RFC 9110, 10.2.3), if it does."""
    for name, value in headers:
        if name.lower() == b"retry-after":
            text = value.decode("latin-1").strip()
            if text.isascii() and text.isdecimal() and len(text) <= 9:
                return float(text)
            with suppress(ValueError, TypeError):
                moment = parsedate_to_datetime(text)
                return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return None


def _in_words(error: BaseException) -> str:
    match error:
        case Refused():
            return str(error)
        case httpcore.TimeoutException():
            return "not answered in time"
        case httpcore.ProtocolError() | httpcore.UnsupportedProtocol():
            return "what was answered is not HTTP"
        case httpcore.NetworkError():
            # Made of the system's.
            cause = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
            return _in_words(cause or OSError(str(error)))
        case ConnectionRefusedError():
            return "the connection was refused"
        case ConnectionResetError() | BrokenPipeError():
            return "the connection was reset"
        case ssl.SSLCertVerificationError():
            return f"the certificate is not valid: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS failed: {error.reason or 'no reason given'}"
        case OSError() if error.strerror:
            return f"no connection: {error.strerror.lower()}"
        case OSError():
            return str(error)[:200] or "the connection failed"
    # Whatever else a stranger's answer may lead to.
    return f"it failed: {type(error).__name__}"
