"""Take webhooks: consume.py PORT INBOX

Verifies each delivery, writes its events to the file INBOX once each, and answers 204. What is to
be done with them is done afterwards, here by printing a line for each.
Environment: WEBHOOK_SECRET, the endpoint's secret; after a rotation both, with a blank between.
"""

import base64
import hashlib
import hmac
import json
import os
import queue
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MOST_BYTES = 1024 * 1024
TOLERANCE_SECONDS = 300  # an older timestamp may be somebody's copy of a delivery


def is_genuine(headers, body, secrets, now):
    """Tell whether a delivery was signed with one of the secrets, a moment ago."""
    message_id = headers.get("webhook-id", "")
    timestamp = headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        return False
    signed = f"{message_id}.{timestamp}.".encode() + body
    given = [text.encode() for text in headers.get("webhook-signature", "").split()]
    for secret in secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        wanted = b"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256))
        if any(hmac.compare_digest(wanted, signature) for signature in given):
            return True
    return False


class Inbox:
    """Events on disk, each once, whichever deliveries they came in. A shop has a table for it."""

    def __init__(self, path):
        self.lock = threading.Lock()
        self.seen = set()
        if os.path.exists(path):
            with open(path) as file:
                # A last line that was cut off was never answered for: it comes again.
                lines = [line for line in file if line.endswith("\n")]
            self.seen = {json.loads(line)["id"] for line in lines}
            os.truncate(path, sum(len(line.encode()) for line in lines))
        self.file = open(path, "a")  # noqa: SIM115 - as long as the process lives

    def add(self, events):
        """Store the events that are new, and return them; they survive a crash from here on."""
        with self.lock:
            new = [event for event in events if event["id"] not in self.seen]
            for event in new:
                self.file.write(json.dumps(event) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.seen.update(event["id"] for event in new)
            return new


def main():
    port, path = int(sys.argv[1]), sys.argv[2]
    secrets = os.environ["WEBHOOK_SECRET"].split()
    inbox, work = Inbox(path), queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            if length > MOST_BYTES:
                self.close_connection = True
                return self.answer(413)
            body = self.rfile.read(length)
            if not is_genuine(self.headers, body, secrets, time.time()):
                return self.answer(401)
            for event in inbox.add(json.loads(body)["data"]["events"]):
                work.put(event)
            return self.answer(204)  # at once: whoever takes longer than 5 s gets it again

        def answer(self, status):
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("listening", server.server_address[1], flush=True)
    while True:
        event = work.get()
        about = event.get("order") or event.get("product") or {}
        print(event["type"], about.get("id", ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
