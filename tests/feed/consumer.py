"""A consumer of webhooks that does what it is told: takes, refuses, hangs, resets, redirects."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook

from app.feed import numbering


class Consumer:
    """Keeps what came; `behave` is called with the handler before it answers, if there is one."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.behave: Callable[[BaseHTTPRequestHandler], bool] | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.received.append((headers, body))
                if outer.behave and outer.behave(self):
                    return
                self.answer(outer.statuses.pop(0) if outer.statuses else 204)

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                if status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 50

            def handle_error(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def events(self) -> list[dict]:
        return [e for _, body in self.received for e in json.loads(body)["data"]["events"]]

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.received]

    def verify(self, secret: str) -> None:
        """Fail unless everything that came was signed with this secret."""
        for headers, body in self.received:
            Webhook(secret).verify(body, headers)


def hang(handler: BaseHTTPRequestHandler) -> bool:
    time.sleep(20)
    return False


def hang_up(handler: BaseHTTPRequestHandler) -> bool:
    """End the connection instead of answering."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def reset(handler: BaseHTTPRequestHandler) -> bool:
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    for each in (handler.rfile, handler.wfile, handler.connection):
        each.close()
    return True


def garbage(handler: BaseHTTPRequestHandler) -> bool:
    handler.wfile.write(b"\x00\xffnot http at all\r\n\r\n")
    handler.close_connection = True
    return True


def drip(handler: BaseHTTPRequestHandler) -> bool:
    """Send the head a byte at a time, each well within any timeout for a read."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.2)
    return True


def endless(handler: BaseHTTPRequestHandler) -> bool:
    """Answer 200 with a body that never ends."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
        time.sleep(0.001)
    return True


def number() -> None:
    """Number what is committed, as a worker does."""
    numberer = numbering.Numberer()
    while numberer.run_once():
        pass
