"""The ceiling: what the HTTP server alone can do. `granian --interface wsgi noop_wsgi:app`."""

BODY = b'{"status":"queued","orderId":17}'
HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]


def app(environ, start_response):
    """Read the body as a real application must, and answer as a purchase would."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", HEADERS)
    return [BODY]
